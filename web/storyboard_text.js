// Edits of a storyboard's text. The grammar is the server's: an outline is what POST /context_forcing/storyboard
// answers for a text, and every function here takes the text with its outline. Lines that do not change keep every
// character. Nothing here needs a page, so that Node can test it.

const LINE = /^(\s*)([0-9:.]+)\s*(\[[^\]]*\])?\s*(.*?)(\s*)$/s

/** 75.5 -> "1:15.5", as the server writes times. */
export function clock(seconds) {
  const micros = Math.round(seconds * 1e6)
  const whole = Math.floor(micros / 1e6)
  const fraction = String(micros % 1e6).padStart(6, '0').replace(/0+$/, '')
  return `${Math.floor(whole / 60)}:${String(whole % 60).padStart(2, '0')}${fraction && `.${fraction}`}`
}

/** The chunk at which every segment begins, and the end: one more than there are segments. */
export function bounds(outline) {
  const result = [0]
  for (const segment of outline.segments) result.push(result.at(-1) + segment.chunks)
  return result
}

/** The words in a line's brackets; empty if every option has its default. */
export function optionsOf({ change, blend, seed }) {
  const words = change === 'keep' ? [] : [change]
  if (blend) words.push(`blend=${blend}`)
  if (seed !== null) words.push(`seed=${seed}`)
  return words.join(' ')
}

function lineOf(time, segment) {
  const options = optionsOf(segment) || (segment.prompt.startsWith('[') ? 'keep' : '')
  return [time, ...(options ? [`[${options}]`] : []), segment.prompt].join(' ')
}

/** The text with some lines replaced: {number: (its parts) -> line}. Space at both ends of a line stays. */
function rewrite(text, edits) {
  const edit = (line, number) => {
    const [, lead, time, , prompt, trail] = line.match(LINE)
    const rest = line.slice(lead.length + time.length, line.length - trail.length)
    return lead + edits.get(number)({ time, rest, prompt }) + trail
  }
  return text
    .split('\n')
    .map((line, i) => (edits.has(i + 1) ? edit(line, i + 1) : line))
    .join('\n')
}

/** The text with segments that begin at other chunks. */
function withBounds(text, outline, begins) {
  const old = bounds(outline)
  const numbers = [...outline.segments.map((segment) => segment.line), outline.end_line]
  const moved = numbers.map((number, i) => [number, i]).filter(([, i]) => begins[i] !== old[i])
  const edit = (i) => ({ rest }) => clock(begins[i] * outline.chunk_seconds) + rest
  return rewrite(text, new Map(moved.map(([number, i]) => [number, edit(i)])))
}

/**
 * The text in which a segment lasts so many chunks. Later segments move with it; with `only` the next segment gives or
 * takes the chunks, and keeps at least one.
 */
export function withDuration(text, outline, index, chunks, only = false) {
  const begins = bounds(outline)
  let delta = Math.max(1, Math.round(chunks)) - outline.segments[index].chunks
  if (only && index + 1 < outline.segments.length) {
    delta = Math.min(delta, outline.segments[index + 1].chunks - 1)
    begins[index + 1] += delta
  } else {
    for (let i = index + 1; i < begins.length; i++) begins[i] += delta
  }
  return withBounds(text, outline, begins)
}

/** The text in which a segment has other options: `change`, `blend` or `seed`. */
export function withOptions(text, outline, index, options) {
  const segment = { ...outline.segments[index], ...options }
  return rewrite(text, new Map([[segment.line, ({ time }) => lineOf(time, segment)]]))
}

/** The next of some values after `value`, round; `step` -1 is the one before. */
export function nextOf(values, value, step = 1) {
  return values[(values.indexOf(value) + step + values.length) % values.length]
}

/** Numbers of chunks over which the prompt of a segment can fade in: all but its last chunk. */
export function blendsOf(segment) {
  const most = Math.max(segment.chunks - 1, segment.blend)
  return Array.from({ length: most + 1 }, (_, i) => i)
}

/** The storyboard from a segment on, with times from 0. After the last segment: one more like it. */
export function tail(outline, from) {
  const rest = outline.segments.slice(from)
  const segments = rest.length ? rest : [{ ...outline.segments.at(-1), change: 'keep', blend: 0 }]
  let begins = 0
  const lines = segments.map((segment) => {
    const line = lineOf(clock(begins * outline.chunk_seconds), segment)
    begins += segment.chunks
    return line
  })
  return [...lines, clock(begins * outline.chunk_seconds)].join('\n') + '\n'
}

/** The lines that are neither empty nor comments: [{number, text}]. */
export function writtenLines(text) {
  return text
    .split('\n')
    .map((line, i) => ({ number: i + 1, text: line.replace(/^\uFEFF/, '').trim() }))
    .filter((line) => line.text && !line.text.startsWith('#'))
}

/**
 * What the result of every segment depends on, as strings: `base` (student, memory, settings), and all that is written
 * up to the segment. Two equal strings are one cached result.
 */
export function signatures(outline, seed, base) {
  let all = `${base} ${outline.chunk_seconds}`
  return outline.segments.map(({ prompt, chunks, change, blend, seed: own }) => {
    all += `\n${JSON.stringify([prompt, chunks, change, blend, own ?? seed])}`
    return all
  })
}
