// Subgraph blueprints: one node each in ComfyUI's library. `inputs` are [name, [node, input], ...] of the nodes inside,
// values as well as wires; `outputs` are [name, node, output].
import { memory, saveVideo, storyboard } from './parts.mjs'
import { STORY, loadOthers, loadStudent } from './students.mjs'

const MORE = `# when a segment begins, counted from here, [how its prompt takes over], its prompt
0:00 What happens next. The camera stays.
# where the video ends
0:06
`

function longVideo() {
  return {
    nodes: [
      loadStudent('self_forcing_dmd.pt', 'self-forcing'), ...loadOthers(),
      memory(4, ['1', 0], 420, 60, { width: 832, height: 480 }, 640),
      storyboard(5, { model: ['1', 0], clip: ['2', 0], memory: ['4', 0] }, STORY, 420, 380),
      saveVideo(6, { memory: ['5', 0], vae: ['3', 0] }, 1120, 60, 'video/long_video'),
    ],
    inputs: [
      ['student', [1, 'student']], ['card', [1, 'card']], ['text_encoder', [2, 'clip_name']], ['vae', [3, 'vae_name']],
      ['width', [4, 'width']], ['height', [4, 'height']], ['text', [5, 'text']], ['seed', [5, 'seed']],
      ['filename_prefix', [6, 'filename_prefix']],
    ],
    outputs: [['memory', 5, 0], ['video', 6, 0]],
    size: [420, 560],
  }
}

const continuation = (id, x, prefix) => [
  storyboard(id, {}, MORE, x, 60),
  saveVideo(id + 1, { memory: [`${id}`, 0] }, x, 780, prefix),
]

function continueVideo() {
  return {
    nodes: continuation(1, 60, 'video/continued'),
    inputs: [
      ['model', [1, 'model']], ['clip', [1, 'clip']], ['vae', [2, 'vae']], ['memory', [1, 'memory']],
      ['text', [1, 'text']], ['seed', [1, 'seed']], ['filename_prefix', [2, 'filename_prefix']],
    ],
    outputs: [['memory', 1, 0], ['video', 2, 0]],
    size: [420, 420],
  }
}

function branch() {
  return {
    nodes: [...continuation(1, 60, 'video/future_A'), ...continuation(3, 760, 'video/future_B')],
    inputs: [
      ['model', [1, 'model'], [3, 'model']], ['clip', [1, 'clip'], [3, 'clip']], ['vae', [2, 'vae'], [4, 'vae']],
      ['memory', [1, 'memory'], [3, 'memory']], ['text_A', [1, 'text']], ['text_B', [3, 'text']], ['seed_A', [1, 'seed']],
      ['seed_B', [3, 'seed']],
    ],
    outputs: [['memory_A', 1, 0], ['memory_B', 3, 0], ['video_A', 2, 0], ['video_B', 4, 0]],
    size: [420, 560],
  }
}

export const BLUEPRINTS = {
  'Long Video from a Storyboard': longVideo, 'Continue a Long Video': continueVideo,
  'Branch a Long Video': branch,
}
