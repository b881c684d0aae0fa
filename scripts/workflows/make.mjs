// Makes templates and blueprints in ComfyUI's page, as its "Save" writes them: scripts/make_workflows.py starts it.
//   node make.mjs http://127.0.0.1:8188 FOLDER [NAME ...]     (PLAYWRIGHT_CORE: a folder that has it in node_modules)
import { createHash } from 'node:crypto'
import fs from 'node:fs'
import { createRequire } from 'node:module'
import path from 'node:path'
import { BLUEPRINTS } from './blueprints.mjs'
import { FILES, STUDENTS } from './students.mjs'
import { TUTORIALS } from './tutorials.mjs'

const { chromium } = createRequire(`${process.env.PLAYWRIGHT_CORE ?? process.cwd()}/`)('playwright-core')
const [url, folder, ...wanted] = process.argv.slice(2)
if (!folder) throw new Error('usage: make.mjs URL FOLDER [NAME ...]')
const WORKFLOWS = { ...STUDENTS, ...TUTORIALS }
const known = [...Object.keys(WORKFLOWS), ...Object.keys(BLUEPRINTS)]
const names = wanted.length ? wanted : known
for (const name of names)
  if (!known.includes(name)) throw new Error(`no workflow ${name}; there are ${known.join('; ')}`)
const UUID = /[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}/g

/** Ids that the page draws by chance follow from the name, so that the same definition gives the same file. */
function write(kind, name, value) {
  const drawn = [...new Set(JSON.stringify(value).match(UUID))]
  const uuid = (number) => {
    const digest = createHash('sha256').update(`${name} ${number}`).digest('hex')
    return [[0, 8], [8, 12], [12, 16], [16, 20], [20, 32]].map(([from, to]) => digest.slice(from, to)).join('-')
  }
  const text = drawn.reduce((all, id, i) => all.replaceAll(id, uuid(i)), JSON.stringify(value, null, 2))
  fs.mkdirSync(path.join(folder, kind), { recursive: true })
  fs.writeFileSync(path.join(folder, kind, `${name}.json`), `${text}\n`)
}
const apiOf = (nodes) => Object.fromEntries(nodes.map(([id, class_type, inputs]) => [id, { class_type, inputs }]))
const layoutOf = (nodes) => nodes.map(([id, , , x, y, width, height, title, colour]) =>
  ({ id, x, y, width, height, title, colour }))

/** The ends of a subgraph stand beside its nodes: where the page puts them depends on the widths of letters. */
function placeEnds(subgraph, nodes) {
  const [left, top] = [3, 4].map((place) => Math.min(...nodes.map((node) => node[place])))
  const [right, bottom] = [3, 4].map((place) => Math.max(...nodes.map((node) => node[place] + node[place + 2])))
  const [width, height] = [128, 48] // the least; the page makes them as large as their slots
  const y = (top + bottom - height) / 2
  subgraph.inputNode.bounding = [left - width - 40, y, width, height]
  subgraph.outputNode.bounding = [right + 40, y, width, height]
}

for (const [name, value] of [['Comfy.TutorialCompleted', true], ['Comfy.Workflow.Persist', false]])
  await fetch(`${url}/api/settings/${name}`, { method: 'POST', body: JSON.stringify(value) })
const browser = await chromium.launch({
  executablePath: process.env.CHROMIUM ?? '/usr/bin/chromium',
  args: ['--no-sandbox', '--disable-gpu', '--no-first-run', '--disable-background-networking', '--disable-sync'],
})
const page = await browser.newPage({ viewport: { width: 1600, height: 900 } })
page.setDefaultTimeout(300_000)

async function open() {
  await page.goto(url)
  // The page loads its default workflow late; wait for it, or it replaces the next one.
  await page.waitForFunction(() => window.app?.graph?._nodes?.length && app.extensionManager.workflow.activeWorkflow)
}

async function load(name, nodes) {
  await page.evaluate(async ({ name, api, layout, files }) => {
    await app.loadApiJson(api, name)
    const colours = LGraphCanvas.node_colors
    for (const { id, x, y, width, height, title, colour } of layout) {
      const node = app.graph.getNodeById(id)
      node.pos = [x, y]
      node.setSize([width, height])
      if (title) node.title = title
      if (colour) Object.assign(node, { color: colours[colour].color, bgcolor: colours[colour].bgcolor })
      for (const widget of node.widgets ?? []) if (widget.name === 'control_after_generate') widget.value = 'fixed'
      const needed = (node.widgets ?? []).map((widget) => files[widget.value]).filter(Boolean)
      if (needed.length) node.properties.models = needed
    }
  }, { name, api: apiOf(nodes), layout: layoutOf(nodes), files: FILES })
}

await open()
for (const name of names.filter((name) => WORKFLOWS[name])) {
  const { nodes, note, groups = [] } = WORKFLOWS[name]()
  await load(name, nodes)
  const saved = await page.evaluate(async ({ note, groups }) => {
    for (const [title, x, y, width, height, colour] of groups) {
      const group = new LiteGraph.LGraphGroup(title)
      app.graph.add(group)
      group.pos = [x, y]
      group.size = [width, height]
      group.color = LGraphCanvas.node_colors[colour].groupcolor
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
  }, { note, groups })
  const wrong = nodes.filter(([id, , inputs]) => Object.entries(inputs).some(
    ([input, value]) => JSON.stringify(saved.prompt[id]?.inputs[input]) !== JSON.stringify(value)))
  if (wrong.length) throw new Error(`${name}: the page changed nodes ${wrong.map(([id]) => id).join(', ')}`)
  write('workflows', name, saved.workflow)
}

for (const name of names.filter((name) => BLUEPRINTS[name])) {
  const { nodes, inputs, outputs, size } = BLUEPRINTS[name]()
  await open() // The page keeps values of a subgraph for the next one whose nodes have the same numbers.
  await load(name, nodes)
  const saved = await page.evaluate(({ name, inputs, outputs, size }) => {
    const { subgraph, node } = app.graph.convertToSubgraph(new Set(app.graph._nodes))
    for (const input of [...subgraph.inputs]) subgraph.removeInput(input)
    const inside = (id) => subgraph._nodes.find((node) => Number(node.id) === id)
    for (const [input, ...ends] of inputs) {
      const slots = ends.map(([id, slot]) => [inside(id).inputs.find(({ name }) => name === slot), inside(id)])
      const made = subgraph.addInput(input, String(slots[0][0].type))
      for (const [slot, node] of slots) if (!made.connect(slot, node)) throw new Error(`${name}: no input ${input}`)
    }
    for (const [output, id, slot] of outputs) {
      const made = subgraph.addOutput(output, String(inside(id).outputs[slot].type))
      if (!made.connect(inside(id).outputs[slot], inside(id))) throw new Error(`${name}: no output ${output}`)
    }
    subgraph.name = node.title = name
    node.pos = [0, 0]
    node.setSize(size)
    return app.graph.serialize()
  }, { name, inputs, outputs, size })
  for (const subgraph of saved.definitions.subgraphs) placeEnds(subgraph, nodes)
  write('subgraphs', name, saved)
}
await browser.close()
