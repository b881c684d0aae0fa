// Runs a workflow in a running ComfyUI and takes a picture of it.
//   cd FOLDER_WITH_PLAYWRIGHT_CORE && node .../scripts/screenshot_workflow.mjs URL OUTPUT.png [WORKFLOW.json]
// WORKFLOW.json defaults to the first tutorial. CHROMIUM names the browser (default /usr/bin/chromium).
import fs from 'node:fs'
import { createRequire } from 'node:module'
import path from 'node:path'

const { chromium } = createRequire(`${process.cwd()}/`)('playwright-core')
const [url, output, file = new URL('../workflows/Tutorial 1 - three prompts.json', import.meta.url)] = process.argv.slice(2)
if (!output) throw new Error('usage: screenshot_workflow.mjs URL OUTPUT.png [WORKFLOW.json]')

const settings = {
  'Comfy.TutorialCompleted': true, 'Comfy.Workflow.Persist': false, 'Comfy.Minimap.Visible': false,
  'Comfy.Graph.CanvasInfo': false, 'Comfy.Graph.CanvasMenu': true,
}
for (const [name, value] of Object.entries(settings))
  await fetch(`${url}/api/settings/${name}`, { method: 'POST', body: JSON.stringify(value) })
// Samplers served from the cache would show no preview.
await fetch(`${url}/free`, { method: 'POST', body: JSON.stringify({ free_memory: true }) })
const browser = await chromium.launch({
  executablePath: process.env.CHROMIUM ?? '/usr/bin/chromium',
  args: ['--no-sandbox', '--disable-gpu', '--no-first-run', '--disable-background-networking', '--disable-sync'],
})
const page = await browser.newPage({ viewport: { width: 1920, height: 1200 } })
await page.goto(url)
// The page loads its default workflow late; wait for it, or it replaces this one.
await page.waitForFunction(() => window.app?.graph?._nodes?.length && app.extensionManager.workflow.activeWorkflow)
const name = path.basename(String(file), '.json')
await page.evaluate(([workflow, name]) => app.loadGraphData(workflow, true, true, name),
  [JSON.parse(fs.readFileSync(file, 'utf8')), name])
await page.evaluate(() => {
  window.ended = null
  for (const end of ['execution_success', 'execution_error', 'execution_interrupted'])
    app.api.addEventListener(end, (event) => { window.ended = [end, event.detail] })
})
await page.getByTestId('queue-button').click()
await page.waitForFunction(() => window.ended, null, { timeout: 600_000 })
const [end, detail] = await page.evaluate(() => window.ended)
if (end !== 'execution_success') throw new Error(`${end}: ${JSON.stringify(detail)}`)

await page.waitForTimeout(7000) // toasts leave, the video loads
await page.evaluate(() => {
  for (const video of document.querySelectorAll('video')) {
    video.pause()
    video.currentTime = video.duration / 2
  }
  const boxes = app.graph._nodes.map((node) => node.getBounding())
  const [left, top] = [0, 1].map((axis) => Math.min(...boxes.map((box) => box[axis])))
  const [right, bottom] = [0, 1].map((axis) => Math.max(...boxes.map((box) => box[axis] + box[axis + 2])))
  app.canvas.ds.fitToBounds([left, top, right - left, bottom - top], { zoom: 0.9 })
  app.canvas.ds.offset[0] += 10 // the bars at the left and the top
  app.canvas.ds.offset[1] += 30
  app.canvas.setDirty(true, true)
})
await page.waitForTimeout(1500)
await page.screenshot({ path: output })
await browser.close()
