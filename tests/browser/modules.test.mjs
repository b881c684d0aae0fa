import assert from 'node:assert/strict'
import { test } from 'node:test'

import { tapOf } from '../../web/branch.js'
import { RunStatus, placeOf } from '../../web/status.js'
import { pageNode, promptNode, studentOf, upstream } from '../../web/upstream.js'
import { blendsOf, clock, nextOf, signatures, writtenLines } from '../../web/storyboard_text.js'

const BOARD = 'ContextForcingStoryboard'
const outline = (...prompts) => ({
  chunk_seconds: 0.75,
  segments: prompts.map((prompt, i) => ({ line: i + 1, chunks: 2, prompt, change: 'keep', blend: 0, seed: null })),
})

test('times are written as the server writes them', () => {
  assert.deepEqual([0, 75.5, 3600, 0.75, 59.9999999, 1 / 3].map(clock),
    ['0:00', '1:15.5', '60:00', '0:00.75', '1:00', '0:00.333333'])
})

test('choices go round in both directions', () => {
  assert.equal(nextOf(['keep', 'recache', 'cut'], 'cut'), 'keep')
  assert.equal(nextOf(['keep', 'recache', 'cut'], 'keep', -1), 'cut')
  assert.deepEqual(blendsOf({ chunks: 3, blend: 0 }), [0, 1, 2])
  assert.deepEqual(blendsOf({ chunks: 1, blend: 2 }), [0, 1, 2])
})

test('lines that count are neither empty nor comments', () => {
  assert.deepEqual(writtenLines('\uFEFF# a\n\n 0:00 A\r\n0:06').map(({ number }) => number), [3, 4])
})

test('a segment depends on all that is written up to it', () => {
  const before = signatures(outline('a', 'b', 'c'), 7, 'base')
  const after = signatures(outline('a', 'x', 'c'), 7, 'base')
  assert.deepEqual(before.map((signature, i) => signature === after[i]), [true, false, false])
  assert.ok(signatures(outline('a'), 8, 'base')[0] !== before[0] && signatures(outline('a'), 7, 'other')[0] !== before[0])
})

test('samplers have even numbers', () => {
  assert.deepEqual(placeOf('2:5.0.0.4'), { board: '2:5', index: 1 })
  assert.deepEqual([placeOf('5.0.0.3'), placeOf('5')], [null, null])
})

test('a branch uses the output where it can, and else repeats lines', () => {
  assert.deepEqual([tapOf(2, 0, 4), tapOf(2, 2, 4), tapOf(3, 2, 4), tapOf(1, 2, 4), tapOf(4, 2, 4)], [2, 2, 2, 0, 4])
})

/** A RunStatus over one board, node 3, with a text of these prompts; `send` waits until an event is handled. */
function following(...prompts) {
  const board = { key: '3', prompts, redraw() {}, matches: (id) => id.replace(/\.0\.0\.\d+$/, '') === '3',
    learn() {}, signatures: async (prompt, id) => signatures(outline(...(prompt?.[id]?.inputs.text ?? board.prompts)), 7, '') }
  const target = new EventTarget()
  const [queue, history] = [{ queue_running: [] }, {}]
  const api = { addEventListener: (...all) => target.addEventListener(...all),
    fetchApi: async (path) => ({ ok: true, json: async () => (path.startsWith('/history') ? history : queue) }) }
  const status = new RunStatus(() => [board])
  status.listen(api)
  const send = (name, detail) => {
    target.dispatchEvent(Object.assign(new Event(name), { detail }))
    return status.events
  }
  const sampler = (index, state, value = 0) => send('progress_state',
    { nodes: { 3: { state: 'running' }, [`3.0.0.${2 * index + 2}`]: { state, value, max: 2 } } })
  const done = (index, thumbnail) => send('executed',
    { node: `3.0.0.${2 * index + 2}`, output: { context_forcing_segment: [{ thumbnail }] } })
  const states = (...now) => signatures(outline(...now), 7, '').map((signature, i) => status.of('3', i, signature))
  const restore = () => status.restore(board)
  return { board, queue, history, restore, send, sampler, done, states: (...now) => states(...now).map(({ state }) => state), all: states }
}

test('a run, an edit, and a run of what is left', async () => {
  const { board, send, sampler, done, states, all } = following('a', 'b', 'c')
  await send('execution_start', { prompt_id: 'p' })
  await sampler(0, 'running', 1)
  assert.deepEqual([states('a', 'b', 'c'), all('a', 'b', 'c')[0].progress], [['running', 'todo', 'todo'], 0.5])
  for (const index of [0, 1, 2]) await done(index, `picture ${index}`)
  await send('execution_success', {})
  assert.deepEqual(states('a', 'b', 'c'), ['made', 'made', 'made'])
  assert.deepEqual(states('a', 'x', 'c'), ['made', 'todo', 'todo'])
  assert.equal(all('a', 'x', 'c')[0].picture, 'picture 0')

  board.prompts = ['a', 'x', 'c']
  await send('execution_start', { prompt_id: 'q' })
  await sampler(1, 'running')
  assert.deepEqual(states('a', 'x', 'c'), ['cached', 'running', 'todo'])
  await done(1, 'picture x')
  await send('execution_interrupted', {})
  assert.deepEqual(states('a', 'x', 'c'), ['cached', 'made', 'todo'])
  assert.deepEqual(states('a', 'b', 'c'), ['cached', 'todo', 'todo'])
})

test('what runs is the text that was queued', async () => {
  const { queue, send, done, states } = following('edited')
  queue.queue_running.push([0, 'p', { 3: { inputs: { text: ['queued'] } } }])
  await send('execution_start', { prompt_id: 'p' })
  await done(0, 'picture')
  await send('execution_success', {})
  assert.deepEqual([states('queued'), states('edited')], [['made'], ['todo']])
})

/** An entry of the server's history: a run of a storyboard that made these segments. */
const entry = (prompts, made, status_str = 'success', cached = []) => ({
  prompt: [0, 'p', { 3: { class_type: BOARD, inputs: { text: prompts } }, 4: { inputs: { memory: ['3', 0] } } }, {}, ['4']],
  outputs: Object.fromEntries(made.map((index) =>
    [`3.0.0.${2 * index + 2}`, { context_forcing_segment: [{ thumbnail: `old ${prompts[index]}` }] }])),
  status: { status_str, messages: [['execution_start', { prompt_id: 'p' }], ['execution_cached', { nodes: cached }]] },
})

test('a storyboard that ran with all samplers from the cache is cached, one that no output needs is not', async () => {
  const { history, restore, states } = following('a')
  history.one = entry(['a'], [])
  await restore()
  assert.deepEqual(states('a'), ['cached'])
  const other = following('a')
  other.history.one = entry(['a'], [])
  other.history.one.prompt[4] = []
  await other.restore()
  assert.deepEqual(other.states('a'), ['todo'])
})

test('a page that is opened later has states and pictures from the history', async () => {
  const { history, restore, states, all } = following('a', 'x', 'c')
  const other = { prompt: [0, 'q', { 3: { class_type: 'ContextForcingSampler', inputs: { text: ['z'] } } }, {}, ['3']],
    outputs: { 3: { context_forcing_segment: [{}] } }, status: { status_str: 'success' } }
  Object.assign(history, { other, one: entry(['a', 'b', 'c'], [0, 1, 2]), two: entry(['a', 'x', 'c'], [1, 2]) })
  await restore()
  assert.deepEqual(states('a', 'x', 'c'), ['cached', 'made', 'made'])
  assert.deepEqual(all('a', 'x', 'c').map(({ picture }) => picture), ['old a', 'old x', 'old c'])
  assert.deepEqual(states('a', 'b', 'c'), ['cached', 'todo', 'todo'])
})

test('of an interrupted run the history has what was finished, of a cached one all', async () => {
  const interrupted = following('a', 'b', 'c', 'd')
  interrupted.history.one = entry(['a', 'b', 'c', 'd'], [1], 'error')
  await interrupted.restore()
  assert.deepEqual(interrupted.states('a', 'b', 'c', 'd'), ['cached', 'made', 'todo', 'todo'])
  interrupted.history.two = entry(['a', 'b', 'c', 'd'], [], 'success', ['3'])
  await interrupted.send('execution_success', {}) // of a run that began before the page was opened
  assert.deepEqual(interrupted.states('a', 'b', 'c', 'd'), ['cached', 'made', 'todo', 'todo'])
  await interrupted.send('status', {})
  assert.deepEqual(interrupted.states('a', 'b', 'c', 'd'), ['cached', 'cached', 'cached', 'cached'])
})

test('a run on this page is newer than the history', async () => {
  const { history, restore, send, done, states } = following('a')
  history.one = entry(['b'], [0])
  await send('execution_start', { prompt_id: 'p' })
  await done(0, 'picture')
  await send('execution_success', {})
  await restore()
  assert.deepEqual([states('a'), states('b')], [['made'], ['todo']])
})

/** A student loader and a storyboard as nodes of the page; the storyboard has a widget that is not queued. */
function onPage(card, steps) {
  const widget = (name, value, options = {}) => ({ name, value, options })
  const loader = { type: 'Load', mode: 0, inputs: [], widgets: [widget('card', card), widget('steps', steps)] }
  const board = { type: 'Board', mode: 0, inputs: [{ name: 'clip', link: 2 }, { name: 'model', link: 1 }, { name: 'memory', link: null }],
    widgets: [widget('text', 'x'), widget('control_after_generate', 'fixed'), widget('strip', '', { serialize: false })],
    getInputNode: () => loader, getInputLink: (slot) => ({ origin_slot: 1 - slot }) }
  return { loader, board: pageNode(board) }
}

test('a node of the page and of a queued prompt depend on the same', () => {
  const prompt = { 5: { class_type: 'Board', inputs: { text: 'x', model: ['1', 0], clip: ['1', 1] } },
    1: { class_type: 'Load', inputs: { steps: 4, card: 'longlive' } } }
  const [queued, { board, loader }] = [promptNode(prompt, '5'), onPage('longlive', 4)]
  assert.deepEqual(upstream(queued), upstream(board))
  assert.deepEqual(studentOf(queued), { card: 'longlive' })
  assert.deepEqual(studentOf(board), { card: 'longlive' })
  assert.notDeepEqual(upstream(queued), upstream(onPage('longlive', 5).board))
  loader.mode = 4
  assert.notDeepEqual(upstream(queued), upstream(board))
})

test('a storyboard that is cached as a whole is cached, one that does not run keeps its states', async () => {
  const { send, states } = following('a', 'b')
  await send('execution_start', { prompt_id: 'p' })
  await send('execution_cached', { nodes: ['3'] })
  await send('execution_success', {})
  assert.deepEqual(states('a', 'b'), ['cached', 'cached'])
  await send('execution_start', { prompt_id: 'q' })
  await send('execution_success', {})
  assert.deepEqual(states('a', 'b'), ['cached', 'cached'])
})
