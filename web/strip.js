// The strip: one box per segment. It draws what it is told and reports what the user does; it knows no node.

import { blendsOf, bounds, clock, nextOf, writtenLines } from './storyboard_text.js'

export const HEIGHT = 250 // px that a node keeps for the strip, with a margin of 10 above and below
const LEAST_WIDTH = 112 // px of a box: more than ten segments scroll
const LEAST_CHUNK = 14 // px per chunk
const PARTS = ['sink', 'slow', 'fast']

function element(tag, className, parent, events = {}) {
  const made = Object.assign(document.createElement(tag), { className })
  for (const [name, listener] of Object.entries(events)) made.addEventListener(name, listener)
  parent?.append(made)
  return made
}

/** A hue per prompt, the same for equal prompts; neighbours differ. */
function huesOf(segments) {
  const prompts = [...new Set(segments.map(({ prompt }) => prompt))]
  return segments.map(({ prompt }) => (130 + 137.5 * prompts.indexOf(prompt)) % 360)
}

const short = (seconds) => String(Math.round(seconds * 100) / 100)

/**
 * `actions`: duration(index, chunks, only), options(index, {change | blend}), branch(index), select(line number).
 * `draw` takes {text, outline, statuses, branchAfter}, or {text, reasons, error}, or {note}.
 */
export class Strip {
  constructor(words, actions) {
    Object.assign(this, { words, actions, boxes: [], selected: null, drag: null })
    this.element = element('div', 'cf-strip')
    this.element.style.minHeight = `${HEIGHT - 20}px`
    this.head = element('div', 'cf-head', this.element)
    this.scroller = element('div', 'cf-scroller', this.element, { wheel: (event) => this.scroll(event) })
    this.row = element('div', 'cf-row', this.scroller)
    this.reach = element('div', 'cf-reach', this.scroller)
    this.foot = element('div', 'cf-foot', this.element)
    // Another width of the node: the boxes fill it.
    new ResizeObserver(() => this.shown && this.draw(this.shown)).observe(this.element)
  }

  draw(shown) {
    if (this.drag) return
    this.shown = shown
    this.element.classList.toggle('cf-refused', !shown.outline)
    if (shown.outline) this.drawSegments(shown)
    else this.drawLines(shown)
  }

  drawSegments({ outline, statuses, branchAfter }) {
    const { words } = this
    const seconds = bounds(outline).at(-1) * outline.chunk_seconds
    const todo = statuses.filter(({ state }) => state === 'todo').length
    this.head.textContent = words.total(outline.segments.length, short(seconds), short(outline.chunk_seconds)) +
      (todo ? `, ${words.todo(todo)}` : '')
    this.scale = Math.max((this.scroller.clientWidth - 4) / bounds(outline).at(-1), LEAST_CHUNK)
    this.clear(outline.segments.length)
    const [begins, hues] = [bounds(outline), huesOf(outline.segments)]
    outline.segments.forEach((segment, i) => {
      this.boxes[i] ??= this.newBox(i)
      this.boxes[i].root.style.setProperty('--cf-hue', hues[i])
      this.fillBox(this.boxes[i], segment, statuses[i], begins[i] * outline.chunk_seconds, branchAfter === i + 1)
    })
    this.drawReach(outline, statuses)
  }

  /** Remove the boxes from number `count` on, and what is no box. */
  clear(count) {
    for (const box of this.boxes.splice(count)) box.root.remove()
    for (const line of this.row.querySelectorAll('.cf-line')) line.remove()
  }

  newBox(index) {
    const { words, actions } = this
    const step = (event) => (event.shiftKey ? -1 : 1)
    const root = element('div', 'cf-box', this.row, { click: () => this.select(index) })
    const button = (name, parent, title, act) => {
      const made = element('button', name, parent, { click: (event) => { event.stopPropagation(); act(event) } })
      return Object.assign(made, { type: 'button', title })
    }
    const segment = () => this.shown.outline.segments[index]
    const picture = element('div', 'cf-picture', root)
    const progress = element('div', 'cf-progress', picture)
    const state = element('span', 'cf-state', picture)
    const time = element('div', 'cf-time', root)
    const prompt = element('div', 'cf-prompt', root)
    const chips = element('div', 'cf-chips', root)
    const change = button('cf-change', chips, words.change, (event) =>
      actions.options(index, { change: nextOf(this.shown.outline.changes, segment().change, step(event)) }))
    const blend = button('cf-blend', chips, words.blend, (event) =>
      actions.options(index, { blend: nextOf(blendsOf(segment()), segment().blend, step(event)) }))
    const seed = Object.assign(element('span', 'cf-seed', chips), { title: words.seed })
    const branch = button('cf-branch', picture, words.branch, () => actions.branch(index))
    branch.textContent = '\u21B3'
    const border = element('div', 'cf-border', root, {
      pointerdown: (event) => this.beginDrag(event, index),
      pointermove: (event) => this.moveDrag(event),
      pointerup: (event) => this.endDrag(event),
      pointercancel: () => this.cancelDrag(),
      click: (event) => event.stopPropagation(),
    })
    border.title = words.drag
    return { root, picture, progress, state, time, prompt, change, blend, seed, branch }
  }

  fillBox(box, segment, { state, progress, picture }, begins, isBranch) {
    const { words } = this
    box.root.style.width = `${this.widthOf(segment.chunks)}px`
    box.root.dataset.state = state
    box.root.classList.toggle('cf-branched', isBranch)
    box.picture.style.backgroundImage = picture ? `url("${picture}")` : ''
    box.progress.style.width = state === 'running' ? `${100 * progress}%` : '0'
    box.state.title = words.states[state]
    box.state.textContent = { todo: '\u25CB', running: '\u25B6', made: '\u2713', cached: '\u2713' }[state]
    this.writeTime(box, begins, segment.chunks)
    box.prompt.textContent = box.prompt.title = segment.prompt
    box.change.textContent = segment.change
    box.change.classList.toggle('cf-default', segment.change === 'keep')
    box.blend.textContent = `blend ${segment.blend}`
    box.blend.classList.toggle('cf-default', !segment.blend)
    box.seed.textContent = segment.seed === null ? '' : `seed ${segment.seed}`
    box.branch.title = isBranch ? words.branched : words.branch
  }

  writeTime(box, begins, chunks) {
    box.time.textContent = `${clock(begins)}  \u00B7  ${short(chunks * this.shown.outline.chunk_seconds)} s`
  }

  widthOf(chunks) {
    return Math.max(LEAST_WIDTH, chunks * this.scale)
  }

  /** Every written line, the wrong ones with the reason. */
  drawLines({ text, reasons, error, note }) {
    this.clear(0)
    this.reach.replaceChildren()
    const wrong = Object.keys(reasons ?? {}).length
    this.head.textContent = wrong ? this.words.wrong(wrong) : (error ?? note)
    this.foot.textContent = ''
    for (const { number, text: written } of wrong ? writtenLines(text) : []) {
      const reason = reasons[number]
      const box = element('div', `cf-line${reason ? ' cf-wrong' : ''}`, this.row, { click: () => this.actions.select(number) })
      element('div', 'cf-time', box).textContent = this.words.line(number)
      if (reason) element('div', 'cf-reason', box).textContent = reason
      element('div', 'cf-prompt', box).textContent = written
    }
    const first = this.row.querySelector('.cf-wrong')
    if (first) this.scroller.scrollLeft = first.offsetLeft - this.row.offsetLeft
  }

  select(index) {
    this.selected = this.selected === index ? null : index
    this.draw(this.shown)
    this.actions.select(this.shown.outline.segments[index].line)
  }

  /** A tick per remembered frame, below the segment that shows it, after the selected or the last finished segment. */
  drawReach(outline, statuses) {
    this.reach.replaceChildren()
    const finished = statuses.map(({ state, result }, i) => (result && state !== 'todo' ? i : -1)).filter((i) => i >= 0)
    const at = finished.includes(this.selected) ? this.selected : finished.at(-1)
    this.boxes.forEach((box, i) => box.root.classList.toggle('cf-selected', i === at && finished.length > 0))
    if (at === undefined) {
      this.foot.textContent = this.words.noReach
      return
    }
    const { result } = statuses[at]
    const begins = bounds(outline)
    const start = result.begins - begins[at] * result.chunk // Frames before the storyboard.
    const place = (frame) => this.placeOf(outline, (frame - start) / result.chunk)
    const tick = (part, frame) => {
      const mark = element('div', `cf-tick cf-${part}`, this.reach)
      mark.style.left = `${place(frame)}px`
      mark.style.width = `${Math.max(2, place(frame + 1) - place(frame) - 1)}px`
    }
    const bracket = element('div', 'cf-bracket', this.reach)
    const from = Math.max(place(result.ends - 1 - result.reach), 0)
    Object.assign(bracket.style, { left: `${from}px`, width: `${place(result.ends) - from}px` })
    for (const part of PARTS) result.remembered[part].filter((frame) => frame >= start).forEach((frame) => tick(part, frame))
    const earlier = PARTS.flatMap((part) => result.remembered[part]).filter((frame) => frame < start).length
    const parts = PARTS.map((part) => `${part} ${result.remembered[part].length}`).join(', ')
    const said = this.words.reach(at + 1, short(result.reach * result.frame_seconds), parts)
    this.foot.textContent = said + (earlier ? ` (${this.words.earlier(earlier)})` : '')
  }

  /** px from the left of a time in chunks. */
  placeOf(outline, chunks) {
    let left = 0
    for (const segment of outline.segments) {
      if (chunks < segment.chunks) return left + (Math.max(chunks, 0) / segment.chunks) * this.widthOf(segment.chunks)
      left += this.widthOf(segment.chunks)
      chunks -= segment.chunks
    }
    return left
  }

  scroll(event) {
    if (event.ctrlKey || event.metaKey || this.scroller.scrollWidth <= this.scroller.clientWidth) return
    this.scroller.scrollLeft += event.deltaX || event.deltaY
    event.preventDefault()
    event.stopPropagation()
  }

  beginDrag(event, index) {
    if (event.button !== 0) return
    event.preventDefault()
    event.stopPropagation()
    event.target.setPointerCapture(event.pointerId)
    const { outline } = this.shown
    const zoom = this.element.getBoundingClientRect().width / this.element.offsetWidth
    const before = outline.segments[index].chunks
    this.drag = { index, x: event.clientX, before, chunks: before, step: zoom * this.scale }
    this.boxes[index].root.classList.add('cf-dragged')
  }

  moveDrag(event) {
    if (!this.drag) return
    const { drag } = this
    drag.chunks = Math.max(1, drag.before + Math.round((event.clientX - drag.x) / drag.step))
    const { outline } = this.shown
    const box = this.boxes[drag.index]
    box.root.style.width = `${this.widthOf(drag.chunks)}px`
    this.writeTime(box, bounds(outline)[drag.index] * outline.chunk_seconds, drag.chunks)
  }

  endDrag(event) {
    if (!this.drag) return
    const { index, chunks, before } = this.drag
    this.cancelDrag()
    if (chunks !== before) this.actions.duration(index, chunks, event.shiftKey)
  }

  cancelDrag() {
    if (this.drag) this.boxes[this.drag.index].root.classList.remove('cf-dragged')
    this.drag = null
    this.draw(this.shown)
  }
}
