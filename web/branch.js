// "Continue from here": a second storyboard, and its video, from the memory after a segment.

import { tail } from './storyboard_text.js'

const BOARD = 'ContextForcingStoryboard'
const SAVE = 'ContextForcingSaveVideo'
const MARGIN = 60

const widget = (node, name) => node.widgets?.find((each) => each.name === name)

function connectLike(model, node, name) {
  const from = model.findInputSlot(name)
  const origin = model.getInputNode(from)
  if (origin) origin.connect(model.getInputLink(from).origin_slot, node, node.findInputSlot(name))
}

/** A new node with the values of another, `values` excepted. */
function copyOf(model, position, values) {
  const node = window.LiteGraph.createNode(model.type)
  model.graph.add(node)
  Object.assign(node, { pos: position, color: model.color, bgcolor: model.bgcolor })
  for (const { name, value, serialize } of model.widgets ?? []) {
    const own = widget(node, name)
    if (own && serialize !== false) own.value = name in values ? values[name] : value
  }
  node.setSize?.([...model.size])
  return node
}

/**
 * The segment after which the new storyboard begins. A storyboard has one output `branch`: if it is in use for another
 * segment, the new one also has the lines from there, or from the start (0). Samplers find what is made of them already.
 */
export function tapOf(after, inUse, count) {
  if (after === count || !inUse || inUse === after) return after
  return inUse < after ? inUse : 0
}

/** The videos that are made of a storyboard. */
function videosOf(board) {
  const links = board.outputs[board.findOutputSlot('memory')].links ?? []
  const nodes = links.map((id) => board.graph.getNodeById(board.graph.getLink(id)?.target_id))
  return nodes.filter((node) => node?.type === SAVE)
}

/** Add the nodes of a branch after segment `index`, counted from 0. Returns the new storyboard. */
export function addBranch(board, outline, index) {
  const count = outline.segments.length
  const output = board.findOutputSlot('branch')
  const isUsed = (board.outputs[output].links ?? []).length > 0
  const number = widget(board, 'branch_after')
  const tap = tapOf(index + 1, isUsed ? number.value : 0, count)
  const top = Math.max(...board.graph._nodes.map((node) => node.pos[1] + node.size[1])) + 2 * MARGIN

  const branch = copyOf(board, [board.pos[0], top], { text: tail(outline, tap), branch_after: 0 })
  branch.title = `${board.title} (after ${tap})`
  for (const name of ['model', 'clip']) connectLike(board, branch, name)
  const memory = branch.findInputSlot('memory')
  if (tap === 0) {
    connectLike(board, branch, 'memory')
  } else if (tap === count) {
    board.connect(board.findOutputSlot('memory'), branch, memory)
  } else {
    number.value = tap
    board.connect(output, branch, memory)
  }
  for (const video of videosOf(board)) {
    const prefix = `${widget(video, 'filename_prefix').value}_branch`
    const copy = copyOf(video, [video.pos[0], top], { filename_prefix: prefix })
    branch.connect(branch.findOutputSlot('memory'), copy, copy.findInputSlot('memory'))
    connectLike(video, copy, 'vae')
  }
  return branch
}

export { BOARD }
