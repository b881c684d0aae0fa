// Makes workflows/demo_chain.json, through ComfyUI's own page so that it is what "Save" would write.
//   cd FOLDER_WITH_PLAYWRIGHT_CORE && node .../scripts/make_workflow.mjs http://127.0.0.1:8188 OUTPUT.json
// CHROMIUM names the browser (default /usr/bin/chromium).
import fs from 'node:fs'
import { createRequire } from 'node:module'

const { chromium } = createRequire(`${process.cwd()}/`)('playwright-core')
const [url, output] = process.argv.slice(2)
if (!output) throw new Error('usage: make_workflow.mjs URL OUTPUT.json')

const SEGMENTS = [
  ['1: pan right', 'A meadow under a clear sky by day. The camera pans right.'],
  ['2: dusk falls', 'A meadow under a clear sky at dusk. The camera stays.'],
  ['3: pan back left', 'A meadow under a clear sky at dusk. The camera pans left.'],
]
const NOTE = `## One video, three prompts
Each sampler continues the **memory** of the one before it; the end of the chain is saved.
- **Prompts**: edit one, and only its segment and the later ones run again. The demo knows meadow, desert, snow; clear, cloudy, foggy; day, dusk, night; the camera stays, pans left, pans right.
- **Length**: set *seconds*, or copy a prompt with its sampler and wire the memory through it. Keep one *seed* through the chain.
- **Memory**: with *slow* at 0 only the first and the latest frames are remembered; compare the reports.
- **Your own student**: replace Load Demo Student by Load Student, CLIPLoader (wan) and VAELoader.`

// [id, type, inputs, x, y, width, height, title, colour]
const column = (i) => 410 + 390 * i
const nodes = [
  [1, 'ContextForcingLoadDemo', {}, 20, 60, 340, 80],
  [2, 'ContextForcingMemory', { model: ['1', 0], width: 0, height: 0, policy: 'as trained', sink: -1, slow: -1,
    fast: -1, threshold: -1 }, 20, 260, 340, 220],
]
SEGMENTS.forEach(([title, text], i) => {
  const memory = i ? [`${2 * i + 2}`, 0] : ['2', 0]
  nodes.push(
    [2 * i + 3, 'CLIPTextEncode', { clip: ['1', 1], text }, column(i), 60, 340, 130, `Prompt ${i + 1}`],
    [2 * i + 4, 'ContextForcingSampler', { model: ['1', 0], positive: [`${2 * i + 3}`, 0], memory, seconds: 3, seed: 7,
      attention: 'sdpa', commit_attends: 'all' }, column(i), 260, 340, 410, title, 'cyan'],
  )
})
nodes.push(
  [9, 'ContextForcingSaveVideo', { memory: ['8', 0], vae: ['1', 2], filename_prefix: 'video/context_forcing', fps: 16,
    scale: 0, crf: 16 }, column(3), 60, 560, 460],
  [10, 'ContextForcingMemoryReport', { memory: ['8', 0], vae: ['1', 2], fps: 16 }, column(3), 580, 560, 440],
  [11, 'PreviewAny', { source: ['10', 1] }, column(3), 1080, 560, 170, 'Report in words'],
)

const api = Object.fromEntries(nodes.map(([id, class_type, inputs]) => [id, { class_type, inputs }]))
const layout = nodes.map(([id, , , x, y, width, height, title, colour]) => ({ id, x, y, width, height, title, colour }))

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
const saved = await page.evaluate(async ({ api, layout, note }) => {
  await app.loadApiJson(api, 'demo_chain')
  const colours = LGraphCanvas.node_colors
  for (const { id, x, y, width, height, title, colour } of layout) {
    const node = app.graph.getNodeById(id)
    node.pos = [x, y]
    node.setSize([width, height])
    if (title) node.title = title
    if (colour) Object.assign(node, { color: colours[colour].color, bgcolor: colours[colour].bgcolor })
    for (const widget of node.widgets ?? []) if (widget.name === 'control_after_generate') widget.value = 'fixed'
  }
  const explain = LiteGraph.createNode('MarkdownNote')
  app.graph.add(explain)
  explain.pos = [20, 740]
  explain.setSize([1120, 220])
  explain.title = 'Read me'
  explain.widgets[0].value = note
  const workflow = app.graph.serialize()
  return { workflow, prompt: (await app.graphToPrompt()).output }
}, { api, layout, note: NOTE })
await browser.close()

const wrong = Object.keys(api).filter((id) => Object.entries(api[id].inputs).some(
  ([name, value]) => JSON.stringify(saved.prompt[id]?.inputs[name]) !== JSON.stringify(value)))
if (wrong.length) throw new Error(`the page changed nodes ${wrong.join(', ')}`)
fs.writeFileSync(output, `${JSON.stringify(saved.workflow, null, 2)}\n`)
