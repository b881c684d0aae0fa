// What the results of a node depend on: types and values of the nodes before it. A node of the page and the same node of a
// prompt that the server ran give the same text, so that the page knows again what was made before it was opened.
// A node here: {key, type, mode, values: [[name, value]], wires: [[name, output of the origin, origin]]}, sorted by name.

const CONTROL = 'control_after_generate' // It changes the next seed, not this result.

const byName = ([a], [b]) => (a < b ? -1 : 1)

/** A node of the page; null for none. */
export function pageNode(node) {
  if (!node) return null
  const wired = (node.inputs ?? []).map(({ name, link }, slot) => [name, slot, link]).filter(([, , link]) => link != null)
  const names = [CONTROL, ...wired.map(([name]) => name)]
  // The page queues the widgets that this condition leaves.
  const widgets = (node.widgets ?? []).filter(({ name, options }) => name && options?.serialize !== false)
  return {
    key: node,
    type: node.comfyClass ?? node.type,
    mode: node.mode ?? 0,
    values: widgets.filter(({ name }) => !names.includes(name)).map(({ name, value }) => [name, value]).sort(byName),
    get wires() {
      const from = (slot) => [node.getInputLink(slot)?.origin_slot, pageNode(node.getInputNode(slot))]
      return wired.map(([name, slot]) => [name, ...from(slot)]).sort(byName)
    },
  }
}

/** A node of a prompt in API format; null for none. Only nodes that run are in a prompt: their mode is 0. */
export function promptNode(prompt, id) {
  if (!prompt?.[id]) return null
  const { class_type: type, inputs } = prompt[id]
  const entries = Object.entries(inputs).filter(([name]) => name !== CONTROL).sort(byName)
  return {
    key: id,
    type,
    mode: 0,
    values: entries.filter(([, value]) => !Array.isArray(value)),
    get wires() {
      const links = entries.filter(([, value]) => Array.isArray(value))
      return links.map(([name, [origin, slot]]) => [name, slot, promptNode(prompt, origin)])
    },
  }
}

export const valueIn = (node, name) => node.values.find(([each]) => each === name)?.[1]

/** The values of a node, `without` some of its own, and of the nodes before it. */
export function upstream(node, without = [], seen = new Map()) {
  if (!node) return null
  if (seen.has(node.key)) return seen.get(node.key)
  seen.set(node.key, seen.size)
  const values = node.values.filter(([name]) => !without.includes(name))
  const wires = node.wires.map(([name, slot, origin]) => [name, slot, upstream(origin, [], seen)])
  return [node.type, node.mode, values, wires]
}

/** What the nodes before a node say about the student: {card, fps, chunk}. The nearest comes first. */
export function studentOf(node) {
  const student = {}
  const seen = new Set()
  const before = ({ wires }) => (wires.find(([name]) => name === 'model') ?? wires[0])?.[2]
  for (let at = before(node); at && !seen.has(at.key); at = before(at)) {
    seen.add(at.key)
    const [card, fps, chunk] = ['card', 'fps', 'chunk'].map((name) => valueIn(at, name))
    if (card && !['auto', 'as is'].includes(card)) student.card ??= card
    if (fps > 0) student.fps ??= fps
    if (chunk > 0) student.chunk ??= chunk
  }
  return student
}

/** Ids of the nodes of a prompt that its outputs, the nodes `ends`, need. */
export function needed(prompt, ends) {
  const all = new Set(ends)
  for (const id of all) {
    for (const value of Object.values(prompt[id]?.inputs ?? {})) if (Array.isArray(value)) all.add(value[0])
  }
  return all
}
