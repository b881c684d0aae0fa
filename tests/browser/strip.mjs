// Drives the storyboard strip in ComfyUI's page and checks what a user sees.
//   node strip.mjs URL classic|vue [FOLDER FOR PICTURES]      (PLAYWRIGHT_CORE: a folder that has it in node_modules)
import assert from 'node:assert/strict'
import fs from 'node:fs'
import { createRequire } from 'node:module'
import path from 'node:path'

const { chromium } = createRequire(`${process.env.PLAYWRIGHT_CORE ?? process.cwd()}/`)('playwright-core')
const [url, renderer, pictures] = process.argv.slice(2)
const root = path.join(import.meta.dirname, '..', '..')
const SLOW = 240_000
const BOARD = 'ContextForcingStoryboard'
const SHORT = [
  '0:00 A meadow under a clear sky by day. The camera stays.',
  '0:00.75 A meadow under a clear sky by day. The camera pans right.',
  '0:01.5 A meadow under a clear sky at dusk. The camera stays.',
  '0:02.25 [cut] A desert under a cloudy sky by day. The camera pans right.',
  '0:03',
]

const browser = await chromium.launch({
  executablePath: process.env.CHROMIUM ?? '/usr/bin/chromium',
  args: ['--no-sandbox', '--disable-gpu', '--disable-quic', '--no-first-run', '--disable-background-networking',
    '--disable-component-update', '--disable-sync'],
})
const page = await browser.newPage({ viewport: { width: 1600, height: 1100 } })
const TEMPLATE = JSON.parse(fs.readFileSync(path.join(root, 'workflows', 'Tutorial 2 - a storyboard.json'), 'utf-8'))
// The first storyboard by its id: a click on a node moves it to the end of the page's list.
await page.addInitScript(() => {
  window.board = (type) => window.app.graph._nodes.filter((node) => node.type === type).sort((a, b) => a.id - b.id)[0]
})
page.setDefaultTimeout(SLOW)
const problems = []
page.on('pageerror', (error) => problems.push(error.stack))

/** A new page, with a workflow; without one, with ComfyUI's own. */
async function open(workflow) {
  const settings = { 'Comfy.TutorialCompleted': true, 'Comfy.Workflow.Persist': false,
    'Comfy.VueNodes.Enabled': renderer === 'vue' }
  for (const [name, value] of Object.entries(settings)) {
    await fetch(`${url}/api/settings/${name}`, { method: 'POST', headers: { 'Content-Type': 'application/json' },
      body: JSON.stringify(value) })
  }
  await page.goto(url)
  const ready = (type) => window.app?.extensionManager?.workflow && window.LiteGraph?.registered_node_types?.[type]
  await page.waitForFunction(ready, BOARD, { polling: 500 })
  // The page loads its own workflow late.
  await shows(() => window.app.graph?._nodes?.length)
  if (workflow) await page.evaluate((workflow) => window.app.loadGraphData(workflow, true, true, 'strip'), workflow)
  await page.evaluate(() => {
    window.ran = []
    window.app.api.addEventListener('executed', ({ detail }) => {
      const [file] = detail.output?.images ?? []
      if (file?.type === 'output' && file.filename.endsWith('.mp4')) window.video = file
    })
    window.app.api.addEventListener('progress_state', ({ detail }) =>
      Object.entries(detail.nodes).forEach(([id, { state }]) => state === 'running' && window.ran.push(id)))
  })
}

const text = () => page.evaluate((type) => window.board(type).widgets.find(({ name }) => name === 'text').value, BOARD)
const count = (type) => page.evaluate((type) => window.app.graph._nodes.filter((node) => node.type === type).length, type)
const boxes = page.locator('.cf-strip').first().locator('.cf-box')
const states = (strip = 0) => page.locator('.cf-strip').nth(strip).locator('.cf-box').evaluateAll((all) =>
  all.map((box) => box.dataset.state))
const shows = (check, argument) => page.waitForFunction(check, argument, { polling: 200 })
const boxesAre = (number) => shows((number) => document.querySelectorAll('.cf-strip')[0]
  ?.querySelectorAll('.cf-box').length === number, number)
const textIs = (wanted) => shows(([type, wanted]) =>
  window.board(type)?.widgets.find(({ name }) => name === 'text').value === wanted, [BOARD, wanted])
const statesAre = (wanted, strip = 0) => shows(([wanted, strip]) => [...document.querySelectorAll('.cf-strip')[strip]
  .querySelectorAll('.cf-box')].map((box) => box.dataset.state).join() === wanted, [wanted.join(), strip])

/** Move the view to a storyboard: the classic renderer's strips and text fields outside of it are not in the page. */
const look = (number) => page.evaluate(([type, number]) => {
  const all = window.app.graph._nodes.filter((node) => node.type === type).sort((a, b) => a.id - b.id)
  window.app.canvas.ds.scale = 1
  window.app.canvas.centerOnNode(all[number])
}, [BOARD, number])

async function picture(name) {
  if (!pictures) return
  const box = await page.locator('.cf-strip').first().boundingBox()
  const clip = { x: Math.max(0, box.x - 40), y: Math.max(0, box.y - 420), width: Math.min(box.width + 80, 1500), height: 680 }
  await page.screenshot({ path: path.join(pictures, `${name}_${renderer}.png`), clip })
}

/** Type a whole text, as a user does. */
async function write(lines) {
  const before = await text()
  const area = await page.evaluateHandle((before) =>
    [...document.querySelectorAll('textarea')].find((area) => area.value === before), before)
  await area.asElement().fill(lines.join('\n'))
  await area.evaluate((area) => area.blur())
  await textIs(lines.join('\n'))
}

async function undo() {
  await page.evaluate(() => document.activeElement?.blur())
  await page.keyboard.press('Control+z')
}

/** Run; the ids of the nodes that were made, of those that are samplers of a storyboard. */
async function run() {
  await page.evaluate(() => {
    window.ran = []
    window.ended = null
    for (const name of ['execution_success', 'execution_error']) {
      window.app.api.addEventListener(name, () => (window.ended = name), { once: true })
    }
  })
  await page.getByTestId('queue-button').click()
  await shows(() => window.ended)
  assert.equal(await page.evaluate(() => window.ended), 'execution_success')
  const ran = await page.evaluate(() => [...new Set(window.ran)])
  return ran.filter((id) => /\.0\.0\.\d*[02468]$/.test(id))
}

async function drag(index, pixels, key) {
  const border = boxes.nth(index).locator('.cf-border')
  await border.scrollIntoViewIfNeeded()
  const { x, y, height } = await border.boundingBox()
  if (key) await page.keyboard.down(key)
  await page.mouse.move(x + 4, y + height / 2)
  await page.mouse.down()
  await page.mouse.move(x + 4 + pixels / 2, y + height / 2)
  await page.mouse.move(x + 4 + pixels, y + height / 2)
  await page.mouse.up()
  if (key) await page.keyboard.up(key)
}

const steps = {
  async 'a template shows a box per segment and its text is unchanged'() {
    await boxesAre(7)
    const [node] = TEMPLATE.nodes.filter(({ type }) => type === BOARD)
    assert.equal(await text(), node.widgets_values[0])
    assert.match(await boxes.nth(3).innerText(), /0:09 .* 3 s[\s\S]*dusk[\s\S]*recache[\s\S]*blend 2/)
    const saved = await page.evaluate((type) => window.board(type).serialize(), BOARD)
    assert.ok(!saved.widgets_values.includes(null) && !JSON.stringify(saved.widgets_values).includes('cf-'))
    await picture('open')
  },
  async 'advanced inputs are hidden, saved and sent, and the menu shows them'() {
    const { hidden, shown, saved, sent } = await page.evaluate(async (type) => {
      const node = window.board(type)
      const advanced = node.widgets.filter(({ options }) => options?.advanced)
      const visible = () => advanced.filter((widget) => node.isWidgetVisible(widget)).map(({ name }) => name)
      const hidden = visible()
      node.toggleAdvanced()
      const shown = visible()
      node.toggleAdvanced()
      advanced[0].value = 'comfyui'
      const [saved, sent] = [node.serialize().widgets_values, (await window.app.graphToPrompt()).output[node.id].inputs]
      advanced[0].value = 'sdpa'
      return { hidden, shown, saved, sent }
    }, BOARD)
    assert.ok(shown.includes('attention') && shown.length >= 4, `${shown}`)
    if (renderer === 'classic') assert.deepEqual(hidden, [])
    else assert.equal(await page.locator('[data-node-id]').getByText('attention', { exact: true }).count(), 0)
    assert.ok(saved.includes('comfyui') && sent.attention === 'comfyui')
    for (const name of shown) assert.ok(name in sent, name)
  },
  async 'templates for published students come first'() {
    const all = await page.evaluate(async () => {
      const templates = await window.app.api.getWorkflowTemplates()
      return Object.values(templates).find((names) => names.some((name) => name.startsWith('Tutorial')))
    })
    const first = all.findIndex((name) => name.startsWith('Tutorial'))
    assert.ok(first > 0 && all.slice(first).every((name) => name.startsWith('Tutorial')), `${all}`)
  },
  async 'a drag writes whole chunks, later segments move, undo takes it back'() {
    const before = await text()
    const chunk = await page.evaluate(() => {
      const box = document.querySelector('.cf-box')
      return box.getBoundingClientRect().width / box.offsetWidth
    })
    await drag(1, 2 * 24 * chunk)
    await shows(([before, type]) => window.board(type).widgets[0].value !== before, [before, BOARD])
    const moved = (await text()).split('\n')
    const begins = moved.filter((line) => /^\d/.test(line)).map((line) => line.split(' ')[0].split(':'))
    const seconds = begins.map(([minutes, rest]) => 60 * minutes + Number(rest))
    const delta = seconds[2] - 6
    assert.ok(delta > 0 && delta % 0.75 === 0, `${delta}`)
    assert.deepEqual(seconds, [0, 3, ...[6, 9, 12, 15, 18, 21].map((time) => time + delta)])
    await undo()
    await textIs(before)
    await boxesAre(7)
  },
  async 'a click changes change and blend, and undo takes each back'() {
    const before = await text()
    await boxes.nth(1).locator('.cf-change').click()
    await textIs(before.replace('0:03 A', '0:03 [recache] A'))
    await boxes.nth(1).locator('.cf-blend').click()
    await textIs(before.replace('0:03 A', '0:03 [recache blend=1] A'))
    await undo()
    await textIs(before.replace('0:03 A', '0:03 [recache] A'))
    await undo()
    await textIs(before)
  },
  async 'a wrong line is marked with number and reason'() {
    const right = (await text()).split('\n')
    await write(right.map((line) => line.replace('[cut]', '[cutt]')))
    await page.locator('.cf-wrong').waitFor()
    assert.match(await page.locator('.cf-wrong').innerText(), /line 7\n\[cutt\] is not known; options are keep, recache/)
    assert.match(await page.locator('.cf-head').first().innerText(), /1 wrong line/)
    await picture('wrong')
    await write(right)
    await boxesAre(7)
  },
  async 'a run gives states and thumbnails'() {
    // A seed of its own, so that the server has no segment of an earlier page.
    await page.evaluate((type) => {
      const { widgets } = window.board(type)
      widgets.find(({ name }) => name === 'seed').value = Date.now() % 1e9
    }, BOARD)
    await write(SHORT)
    await boxesAre(4)
    assert.deepEqual(await states(), ['todo', 'todo', 'todo', 'todo'])
    assert.equal((await run()).length, 4)
    await statesAre(['made', 'made', 'made', 'made'])
    const urls = await boxes.locator('.cf-picture').evaluateAll((all) => all.map((each) => each.style.backgroundImage))
    assert.ok(urls.every((url) => url.startsWith('url("data:image/jpeg')) && new Set(urls).size === 4)
    assert.match(await page.locator('.cf-foot').first().innerText(), /After segment 4 the memory reaches back [\d.]+ s/)
    assert.ok((await page.locator('.cf-tick').count()) >= 3)
    await picture('run')
  },
  async 'after an edit of a line only later segments are to be made'() {
    await write(SHORT.map((line) => line.replace('at dusk', 'at night')))
    await statesAre(['made', 'made', 'todo', 'todo'])
    await picture('edit')
    assert.equal((await run()).length, 2)
    await statesAre(['cached', 'cached', 'made', 'made'])
  },
  async 'a branch begins after its segment, and nothing before it is made again'() {
    for (const [step, storyboards] of [['click', 2], ['undo', 1], ['click', 2]]) {
      if (step === 'click') await boxes.nth(1).locator('.cf-branch').click()
      else await undo()
      await shows(([type, number]) => window.app.graph._nodes.filter((node) => node.type === type).length === number,
        [BOARD, storyboards])
      assert.equal(await count('ContextForcingSaveVideo'), storyboards)
      await statesAre(['cached', 'cached', 'made', 'made'])
    }
    await shows(() => document.querySelectorAll('.cf-strip')[1]?.querySelectorAll('.cf-box').length === 2)
    const branch = await page.evaluate((type) => {
      const [board, branch] = window.app.graph._nodes.filter((node) => node.type === type)
      const after = board.widgets.find(({ name }) => name === 'branch_after').value
      return { after, id: branch.id, text: branch.widgets[0].value, from: branch.getInputNode(2)?.id === board.id }
    }, BOARD)
    assert.deepEqual([branch.after, branch.from], [2, true])
    assert.match(branch.text, /^0:00 A meadow under a clear sky at night.*\n0:00.75 \[cut\] A desert.*\n0:01.5\n$/)
    await page.keyboard.press('.')
    const ran = await run()
    assert.deepEqual(ran.sort(), [`${branch.id}.0.0.2`, `${branch.id}.0.0.4`])
    await statesAre(['made', 'made'], 1)
    await statesAre(['cached', 'cached', 'cached', 'cached'])
    if (pictures) await page.screenshot({ path: path.join(pictures, `branch_${renderer}.png`) })
  },
  async 'a page that is loaded again has states and thumbnails, and runs nothing again'() {
    await open(await page.evaluate(() => window.app.graph.serialize()))
    await look(0)
    await statesAre(['cached', 'cached', 'cached', 'cached'])
    const urls = await boxes.locator('.cf-picture').evaluateAll((all) => all.map((each) => each.style.backgroundImage))
    assert.ok(urls.every((url) => url.startsWith('url("data:image/jpeg')) && new Set(urls).size === 4)
    assert.match(await page.locator('.cf-foot').first().innerText(), /After segment 4 the memory reaches back [\d.]+ s/)
    await picture('again')
    assert.deepEqual(await run(), [])
  },
  async 'the video, dropped on a new page, gives the graph back'() {
    const video = await page.evaluate(() => window.video)
    await open()
    assert.equal(await count(BOARD), 0)
    await page.evaluate(async (video) => {
      const reply = await fetch(window.app.api.apiURL(`/view?${new URLSearchParams(video)}`))
      const transfer = new DataTransfer()
      transfer.items.add(new File([await reply.blob()], video.filename, { type: 'video/mp4' }))
      const drop = new DragEvent('drop', { dataTransfer: transfer, bubbles: true, cancelable: true, clientX: 800, clientY: 600 })
      document.querySelector('#graph-canvas').dispatchEvent(drop)
    }, video)
    await shows((type) => window.app.graph._nodes.filter((node) => node.type === type).length === 2, BOARD)
    await look(0)
    await boxesAre(4)
    assert.match(await text(), /at night/)
    await picture('dropped')
  },
  async 'fourteen segments stay readable'() {
    await look(0)
    const lines = Array.from({ length: 14 }, (_, i) => `0:${String(3 * i).padStart(2, '0')} A meadow by day. The camera stays, take ${i}.`)
    await write([...lines, '0:42'])
    await boxesAre(14)
    // The branch's strip may be outside of the view, without a size.
    const sizes = await page.evaluate(() => {
      const strip = document.querySelector('.cf-strip')
      const { scrollWidth, clientWidth } = strip.querySelector('.cf-scroller')
      return { widths: [...strip.querySelectorAll('.cf-box')].map((box) => box.offsetWidth), scrolls: scrollWidth > clientWidth }
    })
    assert.ok(sizes.scrolls && Math.min(...sizes.widths) >= 112)
    await picture('fourteen')
  },
}

try {
  await open(TEMPLATE)
  for (const [sentence, step] of Object.entries(steps)) {
    try {
      await step()
    } catch (error) {
      if (pictures) await page.screenshot({ path: path.join(pictures, `failed_${renderer}.png`) })
      throw new Error(`${renderer}: ${sentence}`, { cause: error })
    }
    console.log(`${renderer}: ${sentence}`)
  }
  assert.deepEqual(problems, [])
} finally {
  await browser.close()
}
