// What ComfyUI did and would do for every segment of a storyboard, from the events of a run.
// The node expands into two nodes per segment: the sampler of segment k (from 0) is `<board>.0.0.<2k + 2>`.

import { BOARD } from './branch.js'
import { needed } from './upstream.js'

const SAMPLER = /^(.*)\.0\.0\.(\d+)$/
const KEY = 'context_forcing_segment'
const EVENTS = ['execution_start', 'execution_cached', 'progress_state', 'executed', 'execution_success',
  'execution_error', 'execution_interrupted', 'b_preview_with_metadata', 'status']
const REMEMBERED_RUNS = 32

/** The board and the segment of an expanded node, or null if it is no sampler of a storyboard. */
export function placeOf(node) {
  const [, board, number] = String(node).match(SAMPLER) ?? []
  return number && number % 2 === 0 ? { board, index: number / 2 - 1 } : null
}

/**
 * Follows runs. `boards()` gives the storyboards of the page: {key, matches(execution id), signatures(prompt, id),
 * learn(prompt, id, units), redraw()}. What is known survives the nodes: an undo makes them anew.
 */
export class RunStatus {
  constructor(boards) {
    this.boards = boards
    this.results = new Map() // signature -> what the sampler told: thumbnail, remembered frames
    this.kept = new Map() // key of a board -> Map(signature -> 'made' or 'cached') of its last run
    this.run = null // key of a board -> {signatures, states} of the run in progress
    this.past = null // promise of the server's history, oldest first
    this.missed = false // a run ended that began before this page was opened
    this.events = Promise.resolve()
  }

  /** Listen to ComfyUI's api. Events are handled one after the other. */
  listen(api) {
    this.api = api
    for (const name of EVENTS) {
      api.addEventListener(name, ({ detail }) => this.then(() => this[name](detail)))
    }
  }

  /** Act after the events that came before. */
  then(act) {
    this.events = this.events.then(act).catch((error) => console.error(error))
    return this.events
  }

  /** {state: 'todo', 'running', 'made' or 'cached', progress: 0..1, picture} of a segment with this signature. */
  of(key, index, signature) {
    const run = this.run?.get(key)
    const result = this.results.get(signature)
    if (run?.seen && run.signatures[index] === signature) {
      const state = run.states[index] ?? 'todo'
      return { state, progress: run.progress[index] ?? 0, picture: run.pictures[index] ?? result?.thumbnail, result }
    }
    const state = this.kept.get(key)?.get(signature) ?? 'todo'
    return { state, progress: 0, picture: state === 'todo' ? undefined : result?.thumbnail, result }
  }

  async execution_start({ prompt_id }) {
    this.forgetPictures()
    const prompt = await this.promptOf(prompt_id)
    this.run = new Map()
    for (const board of this.boards()) {
      const id = Object.keys(prompt).find((node) => board.matches(node))
      const signatures = await board.signatures(prompt, id)
      this.run.set(board.key, { board, prompt, id, signatures, states: [], progress: [], pictures: [], seen: false })
    }
  }

  /** The nodes of a prompt that runs: the text may have been edited while it was in the queue. {} if it is over. */
  async promptOf(id) {
    const reply = await this.api.fetchApi('/queue')
    const queue = reply.ok ? await reply.json() : {}
    return (queue.queue_running ?? []).find((entry) => entry[1] === id)?.[2] ?? {}
  }

  /** The runs of boards that an execution id belongs to. */
  runsOf(id) {
    return [...(this.run?.values() ?? [])].filter(({ board }) => board.matches(id))
  }

  execution_cached({ nodes }) {
    for (const run of nodes.flatMap((node) => this.runsOf(node))) {
      run.seen = true
      run.states = run.signatures.map(() => 'cached')
      run.board.redraw()
    }
  }

  progress_state({ nodes }) {
    for (const [id, { state, value, max }] of Object.entries(nodes)) {
      for (const run of this.runsOf(id)) run.seen = true
      const place = placeOf(id)
      for (const run of place ? this.runsOf(place.board) : []) {
        // Samplers run in order, and those from the cache send nothing.
        for (let i = 0; i < place.index; i++) run.states[i] ??= 'cached'
        run.states[place.index] = state === 'finished' ? 'made' : 'running'
        run.progress[place.index] = max ? value / max : 0
        run.board.redraw()
      }
    }
  }

  async executed({ node, output }) {
    const [told, place] = [output?.[KEY]?.[0], placeOf(node)]
    for (const run of told && place ? this.runsOf(place.board) : []) {
      run.board.learn(run.prompt, run.id, told)
      run.signatures = await run.board.signatures(run.prompt, run.id)
      this.results.set(run.signatures[place.index], told)
      run.states[place.index] = 'made'
      this.keep(run)
      run.board.redraw()
    }
  }

  b_preview_with_metadata({ blob, nodeId }) {
    const place = placeOf(nodeId)
    for (const run of place ? this.runsOf(place.board) : []) {
      if (run.pictures[place.index]) URL.revokeObjectURL(run.pictures[place.index])
      run.pictures[place.index] = URL.createObjectURL(blob)
      run.board.redraw()
    }
  }

  execution_success() {
    this.end((state) => state ?? 'cached')
  }

  execution_error() {
    this.end((state) => (state === 'running' ? undefined : state))
  }

  execution_interrupted() {
    this.execution_error()
  }

  /** The run is over; `last` gives the last state of a segment. */
  end(last) {
    this.missed ||= !this.run
    for (const run of this.run?.values() ?? []) {
      if (run.seen) {
        run.states = run.signatures.map((_, i) => last(run.states[i]))
        this.keep(run)
      }
    }
    this.forgetPictures()
    const boards = [...(this.run?.values() ?? [])].map((run) => run.board)
    this.run = null
    for (const board of boards) board.redraw()
  }

  /** The server counts its queue anew. Then a run that ended is in its history. */
  async status() {
    if (!this.missed) return
    this.missed = false
    this.past = null
    for (const board of this.boards()) await this.replay(board)
  }

  /** Learn from the server's history what was made of a board before this page was opened. */
  restore(board) {
    return this.then(() => this.kept.has(board.key) || this.replay(board))
  }

  async replay(board) {
    this.past ??= this.api.fetchApi(`/history?max_items=${REMEMBERED_RUNS}`).then((reply) => (reply.ok ? reply.json() : {}))
    for (const { prompt, outputs, status } of Object.values(await this.past)) {
      await this.replayRun(board, prompt, outputs, status)
    }
    board.redraw()
  }

  /** One run of the history. Samplers from the cache have no output. */
  async replayRun(board, [, , prompt, , ends], outputs, { status_str: end, messages = [] }) {
    const id = Object.keys(prompt).find((node) => prompt[node].class_type === BOARD && board.matches(node))
    if (!id) return
    const told = new Map(Object.entries(outputs).filter(([node, output]) => output[KEY] && placeOf(node)?.board === id)
      .map(([node, output]) => [placeOf(node).index, output[KEY][0]]))
    const isCached = messages.some(([name, { nodes }]) => name === 'execution_cached' && nodes.includes(id))
    const isWhole = isCached || (end === 'success' && needed(prompt, ends).has(id))
    if (!isWhole && !told.size) return
    for (const each of told.values()) board.learn(prompt, id, each)
    const signatures = await board.signatures(prompt, id)
    const last = isWhole ? signatures.length : Math.max(...told.keys())
    const states = signatures.map((signature, i) => {
      if (told.has(i)) this.results.set(signature, told.get(i))
      return told.has(i) ? 'made' : i < last ? 'cached' : undefined
    })
    this.keep({ board, signatures, states })
  }

  keep(run) {
    const done = run.signatures.map((signature, i) => [signature, run.states[i]])
    this.kept.set(run.board.key, new Map(done.filter(([, state]) => state === 'made' || state === 'cached')))
  }

  forgetPictures() {
    for (const run of this.run?.values() ?? []) run.pictures.filter(Boolean).forEach((url) => URL.revokeObjectURL(url))
  }
}
