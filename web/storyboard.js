// The storyboard strip: shows the text of the node Context Forcing Storyboard as boxes, and writes it on a click or drag.
// The text widget is the only state: without this file the node works as before.

import { app } from '../../scripts/app.js'
import { api } from '../../scripts/api.js'
import { BOARD, addBranch } from './branch.js'
import { RunStatus } from './status.js'
import { signatures, withDuration, withOptions } from './storyboard_text.js'
import { HEIGHT, Strip } from './strip.js'
import { pageNode, promptNode, studentOf, upstream, valueIn } from './upstream.js'
import { wordsFor } from './words.js'

const LOOK_EVERY = 250 // ms. No event of both renderers tells that a widget or a link has another value.
const TEXT_HEIGHT = 130 // px that the text field keeps beside strip and preview
const NO_PART_OF_A_RESULT = ['text', 'seed', 'branch_after']

const boards = new Set()
const status = new RunStatus(() => boards)
const told = new Map() // what samplers told about the student of a storyboard: base -> {fps, chunk}
const answers = new Map() // request -> promise of the server's answer

const valueOf = (node, name) => node.widgets?.find((widget) => widget.name === name)?.value
const baseOf = (node) => JSON.stringify(upstream(node, NO_PART_OF_A_RESULT))

/** The server's outline of a text for a student, or {error, reasons}. */
function ask(text, student) {
  const body = JSON.stringify({ text, ...student })
  if (!answers.has(body)) {
    if (answers.size > 200) answers.clear()
    const reply = api.fetchApi('/context_forcing/storyboard', { method: 'POST', body }).then((reply) => reply.json())
    reply.catch(() => answers.delete(body))
    answers.set(body, reply)
  }
  return answers.get(body)
}

/** One node and its strip. */
class Board {
  constructor(node) {
    this.node = node
    this.strip = new Strip(wordsFor(app.extensionManager?.setting?.get('Comfy.Locale') ?? 'en'), {
      duration: (index, chunks, only) => this.write((text, outline) => withDuration(text, outline, index, chunks, only)),
      options: (index, options) => this.write((text, outline) => withOptions(text, outline, index, options)),
      branch: (index) => this.change(() => app.canvas.selectNode?.(addBranch(node, this.outline, index))),
      select: (number) => this.showLine(number),
    })
  }

  get key() {
    return `${this.isInRoot ? '' : this.node.graph?.id} ${this.node.id}`
  }

  get isInRoot() {
    return this.node.graph === (app.rootGraph ?? app.graph)
  }

  /** Whether an execution id, `5` or in a subgraph `2:5`, is this node's, or of a node that it expanded into. */
  matches(id) {
    const own = String(id).replace(/\.0\.0\.\d+$/, '')
    return this.isInRoot ? own === String(this.node.id) : own.endsWith(`:${this.node.id}`)
  }

  get text() {
    return valueOf(this.node, 'text') ?? ''
  }

  get base() {
    return baseOf(pageNode(this.node))
  }

  /** What is known about the student of a node of `upstream.js`. */
  student(node = pageNode(this.node)) {
    return { ...studentOf(node), ...told.get(baseOf(node)) }
  }

  /** Signatures of the segments of this node in a prompt, or if it is not there, in the page; empty for a wrong text. */
  async signatures(prompt, id) {
    const node = promptNode(prompt, id) ?? pageNode(this.node)
    const text = valueIn(node, 'text')
    if (typeof text !== 'string') return []
    const outline = await ask(text, this.student(node))
    return outline.segments ? signatures(outline, valueIn(node, 'seed'), baseOf(node)) : []
  }

  /** A sampler of a prompt told fps and chunk of the student. */
  learn(prompt, id, { fps, chunk }) {
    told.set(baseOf(promptNode(prompt, id) ?? pageNode(this.node)), { fps, chunk })
  }

  /** Draw again if anything changed that can be seen. */
  look() {
    if (!this.node.graph) return
    const { element } = this.strip
    // After an undo, the Vue renderer goes on showing the element of the node that was there before.
    if (!element.isConnected) document.querySelector(`[data-node-id="${this.node.id}"] .cf-strip`)?.replaceWith(element)
    if (!this.state) status.restore(this)
    const state = `${this.base}\n${this.text}\n${valueOf(this.node, 'seed')}\n${valueOf(this.node, 'branch_after')}`
    if (state !== this.state) {
      this.state = state
      this.redraw()
    }
  }

  async redraw() {
    const { words } = this.strip
    const slot = this.node.findInputSlot('text')
    const [text, state] = [this.text, this.state]
    if (slot >= 0 && this.node.inputs[slot].link != null) return this.strip.draw({ note: words.wired })
    const answer = await ask(text, this.student()).catch(() => ({ error: words.offline }))
    if (state !== this.state) return // A newer text is on its way.
    this.outline = answer.segments ? answer : null
    if (!this.outline) return this.strip.draw({ text, ...answer })
    const all = signatures(answer, valueOf(this.node, 'seed'), this.base)
    const statuses = all.map((signature, i) => status.of(this.key, i, signature))
    this.strip.draw({ text, outline: answer, statuses, branchAfter: valueOf(this.node, 'branch_after') })
  }

  /** The user's action: one step of undo. */
  change(act) {
    app.canvas.emitBeforeChange?.()
    act()
    this.node.graph?.setDirtyCanvas?.(true, true)
    app.canvas.emitAfterChange?.()
    this.look()
  }

  write(edit) {
    // The strip may show an older text while the answer for the newer one is on its way.
    if (!this.outline || this.strip.shown.text !== this.text) return
    const text = edit(this.text, this.outline)
    const widget = this.node.widgets.find(({ name }) => name === 'text')
    this.change(() => {
      widget.value = text
    })
  }

  /** Select a line in the text field. */
  showLine(number) {
    const widget = this.node.widgets.find(({ name }) => name === 'text')
    const inNode = this.strip.element.closest('[data-node-id]')?.querySelector('textarea')
    const area = [widget.element, widget.inputEl, inNode].find((each) => each instanceof HTMLTextAreaElement)
    if (!area) return
    const lines = this.text.split('\n')
    const from = lines.slice(0, number - 1).join('\n').length + (number > 1 ? 1 : 0)
    area.setSelectionRange(from, from + lines[number - 1].length)
    area.scrollTop = (area.scrollHeight * (number - 2)) / lines.length
  }
}

app.registerExtension({
  name: 'ContextForcing.StoryboardStrip',

  setup() {
    const style = Object.assign(document.createElement('link'), { rel: 'stylesheet' })
    style.href = new URL('./strip.css', import.meta.url).href
    document.head.append(style)
    status.listen(api)
    setInterval(() => document.hidden || boards.forEach((board) => board.look()), LOOK_EVERY)
  },

  nodeCreated(node) {
    if (node.comfyClass !== BOARD) return
    const board = new Board(node)
    const size = { getMinHeight: () => HEIGHT, getMaxHeight: () => HEIGHT }
    const widget = node.addDOMWidget('strip', 'context_forcing_strip', board.strip.element,
      { serialize: false, hideOnZoom: false, ...size })
    const text = node.widgets.find(({ name }) => name === 'text')
    if (text.options) text.options.getMinHeight = () => TEXT_HEIGHT
    widget.serialize = false // The workflow file is the same with and without the strip.
    boards.add(board)
    const removed = node.onRemoved
    node.onRemoved = function (...args) {
      boards.delete(board)
      return removed?.apply(this, args)
    }
  },
})
