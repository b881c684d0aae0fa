// Workflows for published students. Their names are the titles of cards, which show about 28 characters; in the order of
// the alphabet they come before the tutorials. ComfyUI's own order is that of the file system.
import { memory, saveVideo, storyboard } from './parts.mjs'

const HUB = 'https://huggingface.co'
const WAN = `${HUB}/Comfy-Org/Wan_2.1_ComfyUI_repackaged/resolve/main/split_files`
const UMT5 = 'umt5_xxl_fp8_e4m3fn_scaled.safetensors'
const VAE = 'wan_2.1_vae.safetensors'
const FRAMEWISE = 'causal_forcing-framewise.safetensors'
// Files that ComfyUI's page offers if they are missing: name, folder under models, address.
export const FILES = Object.fromEntries([
  ['self_forcing_dmd.pt', 'diffusion_models', `${HUB}/gdhe17/Self-Forcing/resolve/main/checkpoints/self_forcing_dmd.pt`],
  ['context_forcing.pt', 'diffusion_models', `${HUB}/ShuoChen20/context_forcing/resolve/main/model.pt`],
  ['longlive.safetensors', 'diffusion_models', `${HUB}/Efficient-Large-Model/LongLive-1.3B`],
  [FRAMEWISE, 'diffusion_models',
    `${HUB}/TalmajM/causal_forcing_framewise_ComfyUI_repackaged/resolve/main/split_files/diffusion_models/${FRAMEWISE}`],
  [UMT5, 'text_encoders', `${WAN}/text_encoders/${UMT5}`],
  [VAE, 'vae', `${WAN}/vae/${VAE}`],
].map(([name, directory, url]) => [name, { name, directory, url }]))

export const STORY = `# when a segment begins, [how its prompt takes over], its prompt
0:00 A wooden sailing boat lies at a stone pier in a quiet harbour at dawn, soft golden light, calm water, gulls in the distance, film look. The camera stays.
0:06 A wooden sailing boat leaves a quiet harbour at dawn, the sail fills with wind, soft golden light, film look. The camera follows the boat.
0:14 [blend=2] A wooden sailing boat on the open sea under dark storm clouds, high waves, rain and spray, film look. The camera follows the boat.
0:22 [blend=2] A wooden sailing boat on a calm sea after the storm, the clouds open, warm evening light, film look. The camera stays.
# where the video ends
0:30
`
const PICTURE_STORY = `# the first prompt describes your picture and what happens in it
0:00 A person looks into the camera and smiles, soft natural light, film look. The camera stays.
0:06 A person turns the head to the side and looks into the distance, soft natural light, film look. The camera stays.
0:12 A person turns back to the camera and smiles, soft natural light, film look. The camera moves slowly closer.
# where the video ends
0:18
`
const NEEDED = `- [umt5_xxl_fp8_e4m3fn_scaled.safetensors](https://huggingface.co/Comfy-Org/Wan_2.1_ComfyUI_repackaged/tree/main/split_files/text_encoders) in \`models/text_encoders\`
- [wan_2.1_vae.safetensors](https://huggingface.co/Comfy-Org/Wan_2.1_ComfyUI_repackaged/tree/main/split_files/vae) in \`models/vae\`

Then press **R**. If a file is missing, its loader has a red frame and the message names the file.`
const STORY_STEPS = `### 2. Write your story
One line is one segment: its **time** and its **prompt**. The last line is only a time: the end.
### 3. Run
Change a line and run again: only its segment and later segments are generated.`
const UNSEEN = 'The pack was tested with small files of this layout, not with these weights.'

const FROM_STUDENT = { model: ['1', 0], clip: ['2', 0], vae: ['3', 0] }
export const loadStudent = (student, card) =>
  [1, 'ContextForcingLoadStudent', { student, weights: 'auto', card }, 20, 60, 340, 130]
export const loadOthers = (device = 'default') => [
  [2, 'CLIPLoader', { clip_name: UMT5, type: 'wan', device }, 20, 250, 340, 110],
  [3, 'VAELoader', { vae_name: VAE }, 20, 420, 340, 60],
]
const numbered = (groups) => groups.map(([title, ...place], i) => [`${i + 1}. ${title}`, ...place])

function storyGraph({ loaders, title, student, after = '', from = FROM_STUDENT, size = [832, 480], inputs = {}, nodes = [],
  picture, text = STORY }) {
  // From left to right: files, the picture if there is one, the story, the video.
  const [left, top] = picture ? [820, 60] : [420, 300]
  const [width, height] = size
  const steps = [`## ${title}`, '### 1. Put the files into these folders', student, NEEDED, STORY_STEPS, after, UNSEEN]
  return {
    nodes: [...loaders,
      memory(4, from.model, 420, picture ? 450 : 60, { width, height }, picture ? 340 : 640),
      ...(picture ?? nodes),
      storyboard(5, { model: from.model, clip: from.clip, memory: [picture ? '8' : '4', 0] }, text, left, top, inputs),
      saveVideo(6, { memory: ['5', 0], vae: from.vae }, left + 700, 60, 'video/long_video')],
    note: [steps.filter(Boolean).join('\n'), 20, 540, 340, 540],
    groups: numbered([
      ['Model files', 0, -20, 380, 520, 'yellow'],
      ...(picture ? [['Your picture', 400, -20, 380, 880, 'pale_blue']] : []),
      ['Your story', left - 20, -20, 680, top + 800, 'cyan'],
      ['The video', left + 680, -20, 600, 580, 'green'],
    ]),
  }
}

const SELF_FORCING = '- [self_forcing_dmd.pt](https://huggingface.co/gdhe17/Self-Forcing/tree/main/checkpoints) in `models/diffusion_models`'
const selfForcing = () => loadStudent('self_forcing_dmd.pt', 'self-forcing')

const selfForcingStory = () => storyGraph({
  title: 'A long video from a text, with Self-Forcing',
  loaders: [selfForcing(), ...loadOthers()],
  student: SELF_FORCING,
  after: '832x480 needs about 12.5 GB of video memory beside the weights; the template *Long video (low memory)* needs less.',
})
const longLiveStory = () => storyGraph({
  title: 'A long video from a text, with LongLive',
  loaders: [loadStudent('longlive.safetensors', 'longlive'), ...loadOthers()],
  student: `- \`longlive_base.pt\` and \`lora.pt\` of [LongLive-1.3B](https://huggingface.co/Efficient-Large-Model/LongLive-1.3B), merged into \`longlive.safetensors\` in \`models/diffusion_models\`:
\`context-forcing convert longlive_base.pt --lora lora.pt --card longlive -o longlive.safetensors\``,
  after: 'LongLive remembers the first and the latest frames. For other memories set *policy* and *slow* of Slow-Fast Memory.',
})
const contextForcingStory = () => storyGraph({
  title: 'A long video from a text, with Context Forcing',
  loaders: [loadStudent('context_forcing.pt', 'context-forcing'), ...loadOthers()],
  student: '- [model.pt](https://huggingface.co/ShuoChen20/context_forcing/tree/main), renamed to `context_forcing.pt`, in `models/diffusion_models`',
  after: 'The released weights remember 3 first, 12 slow and 6 latest frames, with their own policy *released*.',
})
const lowMemoryStory = () => storyGraph({
  title: 'A long video with little video memory',
  loaders: [selfForcing(), ...loadOthers('cpu')],
  student: SELF_FORCING,
  size: [576, 320],
  inputs: { layout: 'from RAM' },
  after: '### What saves memory here\n- 576x320 instead of 832x480\n- the text encoder runs on the CPU (*device*)\n- keys and values stay in RAM (*layout*, an advanced input of the storyboard): slower, the same video',
})
const fromPicture = (title, node, after) => storyGraph({
  title,
  loaders: [selfForcing(), ...loadOthers()],
  student: SELF_FORCING,
  text: PICTURE_STORY,
  picture: [
    [7, 'LoadImage', { image: 'example.png' }, 420, 60, 340, 330, 'Your picture'],
    [8, node, { memory: ['4', 0], vae: ['3', 0], images: ['7', 0] }, 420, 720, 340, 90, undefined, 'green'],
  ],
  after,
})
const pictureStory = () => fromPicture('A long video from your picture, with Self-Forcing', 'ContextForcingRemember',
  'Choose your picture in *Your picture*. It is cropped to the size of the memory, is the first frame, and is never forgotten. Self-Forcing was trained on text only.')
const referenceStory = () => fromPicture('A long video that remembers a picture, with Self-Forcing', 'ContextForcingReference',
  'Choose a picture of a character or a place in *Your picture*. It is remembered to the end and is not in the video. Self-Forcing was not trained with references, so the effect may be small.')
const loraStory = () => storyGraph({
  title: 'A long video with a LoRA and fp8 weights',
  loaders: [
    [1, 'UNETLoader', { unet_name: FRAMEWISE, weight_dtype: 'fp8_e4m3fn' }, 20, 60, 340, 90],
    ...loadOthers(),
    [7, 'LoraLoaderModelOnly', { model: ['1', 0], lora_name: 'wan_1.3b_lora.safetensors', strength_model: 1 }, 1120, 620,
      340, 90, 'Your LoRA'],
    [8, 'ContextForcingStudentSettings', { model: ['7', 0], steps: '', shift: 0, solver: 'as is', fps: 0, chunk: -1,
      window: -1, sink: -1, slow: -1, fast: -1, card: 'causal-forcing-framewise' }, 1120, 770, 340, 290],
  ],
  from: { ...FROM_STUDENT, model: ['8', 0] },
  student: '- [causal_forcing-framewise.safetensors](https://huggingface.co/TalmajM/causal_forcing_framewise_ComfyUI_repackaged/tree/main/split_files/diffusion_models) in `models/diffusion_models`\n- your LoRA for Wan 2.1 text-to-video 1.3B in `models/loras`; choose it in *Your LoRA*, or bypass that node (Ctrl+B)',
  after: 'ComfyUI keeps the weights as fp8 (*weight_dtype*). *Student Settings* says which student it is: files in ComfyUI\'s layout have no card.',
})

export const STUDENTS = {
  'Long video (Context Forcing)': contextForcingStory,
  'Long video (LongLive)': longLiveStory,
  'Long video (LoRA and fp8)': loraStory,
  'Long video (low memory)': lowMemoryStory,
  'Long video (Self-Forcing)': selfForcingStory,
  'Long video from a picture': pictureStory,
  'Long video with a reference': referenceStory,
}
