// Makes workflows through ComfyUI's own page, so that they are what "Save" would write.
//   cd FOLDER_WITH_PLAYWRIGHT_CORE && node .../scripts/make_workflow.mjs http://127.0.0.1:8188 FOLDER/NAME.json ...
// NAME is one of WORKFLOWS below. CHROMIUM names the browser (default /usr/bin/chromium).
import fs from 'node:fs'
import { createRequire } from 'node:module'
import path from 'node:path'

const { chromium } = createRequire(`${process.cwd()}/`)('playwright-core')
const [url, ...outputs] = process.argv.slice(2)
if (!outputs.length) throw new Error('usage: make_workflow.mjs URL FOLDER/NAME.json ...')

// A node: [id, type, inputs, x, y, width, height, title, colour]. A note: [text, x, y, width, height].
const loadDemo = [1, 'ContextForcingLoadDemo', {}, 20, 60, 340, 80]
const memory = [2, 'ContextForcingMemory', { model: ['1', 0], width: 0, height: 0, policy: 'as trained', sink: -1,
  slow: -1, fast: -1, threshold: -1 }, 20, 260, 340, 220]
const saveVideo = (id, memory, x, y) => [id, 'ContextForcingSaveVideo', { memory, vae: ['1', 2],
  filename_prefix: 'video/context_forcing', fps: 16, scale: 0, crf: 16 }, x, y, 560, 460]
const report = (id, memory, x, y) => [id, 'ContextForcingMemoryReport', { memory, vae: ['1', 2], fps: 16 }, x, y, 560,
  440]

function demoChain() {
  const segments = [
    ['1: pan right', 'A meadow under a clear sky by day. The camera pans right.'],
    ['2: dusk falls', 'A meadow under a clear sky at dusk. The camera stays.'],
    ['3: pan back left', 'A meadow under a clear sky at dusk. The camera pans left.'],
  ]
  const column = (i) => 410 + 390 * i
  const nodes = segments.flatMap(([title, text], i) => [
    [2 * i + 3, 'CLIPTextEncode', { clip: ['1', 1], text }, column(i), 60, 340, 130, `Prompt ${i + 1}`],
    [2 * i + 4, 'ContextForcingSampler', { model: ['1', 0], positive: [`${2 * i + 3}`, 0],
      memory: [`${i ? 2 * i + 2 : 2}`, 0], seconds: 3, seed: 7, attention: 'sdpa', commit_attends: 'all' }, column(i),
      260, 340, 510, title, 'cyan'],
  ])
  const words = [11, 'PreviewAny', { source: ['10', 1] }, column(3), 1080, 560, 170, 'Report in words']
  const note = `## One video, three prompts
Each sampler continues the **memory** of the one before it; the end of the chain is saved.
- **Prompts**: edit one, and only its segment and the later ones run again. The demo knows meadow, desert, snow; clear, cloudy, foggy; day, dusk, night; the camera stays, pans left, pans right.
- **Length**: set *seconds*, or copy a prompt with its sampler and wire the memory through it. Keep one *seed* through the chain.
- **Memory**: with *slow* at 0 only the first and the latest frames are remembered; compare the reports.
- **Your own student**: replace Load Demo Student by Load Student, CLIPLoader (wan) and VAELoader.`
  return {
    nodes: [loadDemo, memory, ...nodes, saveVideo(9, ['8', 0], column(3), 60), report(10, ['8', 0], column(3), 580),
      words],
    note: [note, 20, 840, 1120, 190],
  }
}

function demoStoryboard() {
  const text = `# when a segment begins, [how its prompt takes over], its prompt
0:00 A meadow under a clear sky by day. The camera stays.
0:03 A meadow under a clear sky by day. The camera pans right.
0:06 A meadow under a clear sky by day. The camera stays.
0:09 [recache blend=2] A meadow under a clear sky at dusk. The camera stays.
0:12 A meadow under a clear sky at dusk. The camera pans left.
0:15 [cut] A desert under a cloudy sky by day. The camera pans right.
0:18 [blend=2] A desert under a foggy sky at night. The camera stays.
# where the video ends
0:21
`
  const note = `## One video, one text
Each line is a segment: **when** it begins, its **prompt**, and in brackets, if wanted, how the prompt takes over from the one before: *keep* (if nothing is said), *recache*, *flush*, *cut*, *cut_new_sink*; *blend=2* fades it in over two chunks; *seed=7* is for this line alone. The last line is only a time: the end.
- **Edit a line** and run: its segment and the later ones are made again, the earlier ones come from the cache.
- **Times** go to the nearest whole chunk (0.75 s); *What was made* says where they are.
- The demo knows meadow, desert, snow; clear, cloudy, foggy; day, dusk, night; the camera stays, pans left, pans right.
- **Your own student**: replace Load Demo Student by Load Student, CLIPLoader (wan) and VAELoader.`
  return {
    nodes: [loadDemo, memory,
      [3, 'ContextForcingStoryboard', { model: ['1', 0], clip: ['1', 1], memory: ['2', 0], text, seed: 7,
        attention: 'sdpa', keep_in: 'RAM', autosave: false }, 410, 60, 640, 660, 'Storyboard', 'cyan'],
      [6, 'PreviewAny', { source: ['3', 1] }, 410, 790, 640, 240, 'What was made'],
      saveVideo(4, ['3', 0], 1100, 60), report(5, ['3', 0], 1100, 580)],
    note: [note, 20, 540, 340, 490],
  }
}

const WORKFLOWS = { demo_chain: demoChain, demo_storyboard: demoStoryboard }
const plans = outputs.map((output) => [output, path.basename(output, '.json')])
for (const [output, name] of plans)
  if (!WORKFLOWS[name]) throw new Error(`${output}: no workflow ${name}; there are ${Object.keys(WORKFLOWS).join(', ')}`)

for (const [name, value] of [['Comfy.TutorialCompleted', true], ['Comfy.Workflow.Persist', false]])
  await fetch(`${url}/api/settings/${name}`, { method: 'POST', body: JSON.stringify(value) })
const browser = await chromium.launch({
  executablePath: process.env.CHROMIUM ?? '/usr/bin/chromium',
  args: ['--no-sandbox', '--disable-gpu', '--no-first-run', '--disable-background-networking', '--disable-sync'],
})
const page = await browser.newPage({ viewport: { width: 1600, height: 900 } })
await page.goto(url)
// The page loads its default workflow late; wait for it, or it replaces ours.
await page.waitForFunction(() => window.app?.graph?._nodes?.length && app.extensionManager.workflow.activeWorkflow)
for (const [output, name] of plans) {
  const { nodes, note } = WORKFLOWS[name]()
  const api = Object.fromEntries(nodes.map(([id, class_type, inputs]) => [id, { class_type, inputs }]))
  const layout = nodes.map(([id, , , x, y, width, height, title, colour]) =>
    ({ id, x, y, width, height, title, colour }))
  const saved = await page.evaluate(async ({ name, api, layout, note }) => {
    await app.loadApiJson(api, name)
    const colours = LGraphCanvas.node_colors
    for (const { id, x, y, width, height, title, colour } of layout) {
      const node = app.graph.getNodeById(id)
      node.pos = [x, y]
      node.setSize([width, height])
      if (title) node.title = title
      if (colour) Object.assign(node, { color: colours[colour].color, bgcolor: colours[colour].bgcolor })
      for (const widget of node.widgets ?? []) if (widget.name === 'control_after_generate') widget.value = 'fixed'
    }
    const [text, x, y, width, height] = note
    const explain = LiteGraph.createNode('MarkdownNote')
    app.graph.add(explain)
    explain.pos = [x, y]
    explain.setSize([width, height])
    explain.title = 'Read me'
    explain.widgets[0].value = text
    const workflow = app.graph.serialize()
    return { workflow, prompt: (await app.graphToPrompt()).output }
  }, { name, api, layout, note })

  const wrong = Object.keys(api).filter((id) => Object.entries(api[id].inputs).some(
    ([input, value]) => JSON.stringify(saved.prompt[id]?.inputs[input]) !== JSON.stringify(value)))
  if (wrong.length) throw new Error(`${name}: the page changed nodes ${wrong.join(', ')}`)
  fs.writeFileSync(output, `${JSON.stringify(saved.workflow, null, 2)}\n`)
}
await browser.close()
