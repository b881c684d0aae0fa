// The tutorials: workflows of the built-in student, which run without a download. Their names are the titles of cards.
import { memory as newMemory, saveVideo as save, storyboard } from './parts.mjs'

const vae = ['1', 2]
const loadDemo = [1, 'ContextForcingLoadDemo', {}, 20, 60, 340, 80]
const memory = newMemory(2, ['1', 0], 20, 260)
const saveVideo = (id, memory, ...place) => save(id, { memory, vae }, ...place)
const prompt = (id, title, text, x, y) => [id, 'CLIPTextEncode', { clip: ['1', 1], text }, x, y, 340, 130, title]
const sampler = (id, title, positive, memory, x, y, inputs = {}) => [id, 'ContextForcingSampler', { model: ['1', 0],
  positive: [`${positive}`, 0], memory: [`${memory}`, 0], seconds: 3, seed: 7, attention: 'sdpa', commit_attends: 'card',
  ...inputs }, x, y, 340, 534, title, 'cyan']
const report = (id, memory, x, y) => [id, 'ContextForcingMemoryReport', { memory, vae, fps: 16 }, x, y, 560, 440]

function demoChain() {
  const segments = [
    ['1: pan right', 'A meadow under a clear sky by day. The camera pans right.'],
    ['2: dusk falls', 'A meadow under a clear sky at dusk. The camera stays.'],
    ['3: pan back left', 'A meadow under a clear sky at dusk. The camera pans left.'],
  ]
  const column = (i) => 410 + 390 * i
  const nodes = segments.flatMap(([title, text], i) => [
    prompt(2 * i + 3, `Prompt ${i + 1}`, text, column(i), 60),
    sampler(2 * i + 4, title, 2 * i + 3, i ? 2 * i + 2 : 2, column(i), 260),
  ])
  const words = [11, 'PreviewAny', { source: ['10', 1] }, column(3), 1080, 560, 170, 'Report in words']
  const note = `## One video, three prompts
Each sampler continues the **memory** of the sampler before. Save Long Video writes the video of the last memory.
- **Prompts**: change one, and only its segment and later segments run again. Words of the demo: meadow, desert, snow; clear, cloudy, foggy; day, dusk, night; the camera stays, pans left, pans right.
- **Length**: set *seconds*, or copy a prompt with its sampler and connect the memory through it. Use one *seed* for the whole chain.
- **Memory**: with *slow* at 0 only the first and the latest frames are remembered. Compare the reports.
- **Other student**: replace Load Demo Student with Load Student, CLIPLoader (wan) and VAELoader.`
  return {
    nodes: [loadDemo, memory, ...nodes, saveVideo(9, ['8', 0], column(3), 60), report(10, ['8', 0], column(3), 580),
      words],
    note: [note, 20, 840, 1120, 190],
  }
}

function demoStoryboard() {
  const text = `# when a segment begins, [how its prompt takes over], its prompt
0:00 A meadow under a clear sky by day. The camera stays.
0:03 A meadow under a clear sky by day. The camera pans right.
0:06 A meadow under a clear sky by day. The camera stays.
0:09 [recache blend=2] A meadow under a clear sky at dusk. The camera stays.
0:12 A meadow under a clear sky at dusk. The camera pans left.
0:15 [cut] A desert under a cloudy sky by day. The camera pans right.
0:18 [blend=2] A desert under a foggy sky at night. The camera stays.
# where the video ends
0:21
`
  const note = `## One video, one text
Each line is a segment: its **time**, options in brackets, and its **prompt**. The options are the change of the remembered frames (*keep*, *recache*, *flush*, *cut*, *cut_new_sink*; default *keep*), *blend=2* (the prompt fades in over two chunks) and *seed=7* (for this line only). The last line is only a time: the end.
- **Change a line** and run: its segment and later segments run again, earlier segments come from the cache.
- **Times** are rounded to whole chunks (0.75 s); *What was made* shows them.
- Words of the demo: meadow, desert, snow; clear, cloudy, foggy; day, dusk, night; the camera stays, pans left, pans right.
- **Other student**: replace Load Demo Student with Load Student, CLIPLoader (wan) and VAELoader.`
  return {
    nodes: [loadDemo, memory,
      storyboard(3, { model: ['1', 0], clip: ['1', 1], memory: ['2', 0] }, text, 410, 60),
      [6, 'PreviewAny', { source: ['3', 1] }, 410, 890, 640, 240, 'What was made'],
      saveVideo(4, ['3', 0], 1100, 60), report(5, ['3', 0], 1100, 580),
      [7, 'ContextForcingConsistency', { memory: ['3', 0], vae, every: 1, fps: 16 }, 1700, 60, 560, 460]],
    note: [note, 20, 540, 340, 590],
  }
}

function demoBranch() {
  const futures = [
    ['turn back', 'A meadow under a clear sky by day. The camera pans left.', { seed: 11 }],
    ['night falls', 'A meadow under a clear sky at night. The camera pans right.', { seed: 11, change: 'recache', blend: 2 }],
    ['a new scene', 'A desert under a clear sky by day. The camera stays.', { seed: 10, change: 'cut_new_sink' }],
  ]
  const column = (i) => 800 + 390 * i
  const nodes = futures.flatMap(([title, text, inputs], i) => [
    prompt(3 * i + 6, `Prompt ${'ABC'[i]}`, text, column(i), 60),
    sampler(3 * i + 7, `${'ABC'[i]}: ${title}`, 3 * i + 6, 4, column(i), 260, inputs),
    saveVideo(3 * i + 8, [`${3 * i + 7}`, 0], column(i), 840, `video/future_${'ABC'[i]}`, 340, 380),
  ])
  const note = `## One past, three futures
The **memory** of one sampler is connected to three samplers. Each future begins with the same three seconds, bit for bit, and continues under its own prompt. The futures are independent.
- **A** turns back: the same things stand there.
- **B** changes to night: *recache* computes the remembered frames again under the new prompt, *blend* fades the prompt in over two chunks.
- **C** begins a new scene: with *cut_new_sink* no frame is remembered.
- **Another future**: change its prompt or its *seed* and run. The past and the other futures come from the cache.`
  return {
    nodes: [loadDemo, memory,
      prompt(3, 'Prompt', 'A meadow under a clear sky by day. The camera pans right.', 410, 60),
      sampler(4, 'The past', 3, 2, 410, 260, { seed: 11 }), ...nodes],
    note: [note, 20, 840, 730, 380],
  }
}

function demoStartImage() {
  const note = `## A video from a picture
**Start Image or Clip** begins the video of an empty memory with a picture. The picture is the first frame, so it stays in memory (*sink*): the camera turns away from it and returns.
- **Your picture**: replace the yellow group with *Load Image*. The picture is cropped to the size of the memory. The demo student was trained on its own world only, so the group generates a picture of it: one frame of another video (*seed* 11).
- **The prompt** describes what happens after the picture, and should fit it.
- **Other student**: replace Load Demo Student with Load Student, CLIPLoader (wan) and VAELoader.`
  return {
    nodes: [loadDemo, memory,
      prompt(3, 'What the picture shows', 'Snow under a clear sky by day. The camera pans right.', 410, 60),
      sampler(4, 'Another video', 3, 2, 410, 260, { seconds: 1.5, seed: 11 }),
      [5, 'VAEDecode', { samples: ['4', 1], vae }, 410, 840, 340, 50],
      [6, 'ImageFromBatch', { image: ['5', 0], batch_index: 20, length: 1 }, 410, 960, 340, 90, 'Its last frame'],
      [7, 'PreviewImage', { images: ['6', 0] }, 800, 260, 340, 250, 'The picture'],
      [8, 'ContextForcingRemember', { memory: ['2', 0], vae, images: ['6', 0] }, 800, 60, 340, 90,
        undefined, 'green'],
      prompt(9, 'Prompt 1', 'Snow under a clear sky by day. The camera pans right.', 1190, 60),
      sampler(10, '1: away from it', 9, 8, 1190, 260, { seed: 2 }),
      prompt(11, 'Prompt 2', 'Snow under a clear sky by day. The camera pans left.', 1580, 60),
      sampler(12, '2: and back', 11, 10, 1580, 260, { seed: 2 }),
      saveVideo(13, ['12', 0], 1190, 840, 'video/from_a_picture', 730, 520)],
    note: [note, 20, 540, 340, 560],
    groups: [['A picture; or Load Image', 390, -20, 380, 1100, 'yellow']],
  }
}

function demoContinueVideo() {
  const note = `## A video from a clip
**Start Image or Clip** begins the video of an empty memory with the frames of a clip. They are part of the video and are remembered; the first sampler continues from the last frame.
- **Your clip**: replace the yellow group with *Load Video*, at the frame rate of the student (16). The clip is cropped to the size of the memory; 1 + 4k frames are used. The demo student was trained on its own world only, so the group generates a clip of it, writes it to a file and reads its frames.
- **The prompt** describes what happens after the clip: here the camera turns back to where the clip began.
- **Clips of this pack** need no decoding: connect the *memory*, or use Save Memory and Load Memory.
- **Other student**: replace Load Demo Student with Load Student, CLIPLoader (wan) and VAELoader.`
  return {
    nodes: [loadDemo, memory,
      prompt(3, 'What the clip shows', 'A desert under a clear sky by day. The camera pans right.', 410, 60),
      sampler(4, 'Another video', 3, 2, 410, 260, { seed: 3 }),
      saveVideo(5, ['4', 0], 410, 840, 'video/clip', 340, 380),
      [6, 'GetVideoComponents', { video: ['5', 0] }, 800, 60, 340, 90],
      [7, 'ContextForcingRemember', { memory: ['2', 0], vae, images: ['6', 0] }, 800, 260, 340, 90,
        undefined, 'green'],
      prompt(8, 'Prompt', 'A desert under a clear sky by day. The camera pans left.', 1190, 60),
      sampler(9, 'What happens next', 8, 7, 1190, 260, { seed: 8 }),
      saveVideo(10, ['9', 0], 800, 840, 'video/continued', 730, 520)],
    note: [note, 20, 540, 340, 680],
    groups: [['A clip; or Load Video', 390, -20, 380, 1260, 'yellow']],
  }
}

const SAVED = 'context_forcing/tomorrow'

function saveToday() {
  const note = `## Begin today, continue tomorrow: today
**Save Memory** writes the video so far and the remembered frames to a file in the output folder. Press **Run** once.
Then open the template **Tutorial 7**, at once, after a restart of ComfyUI, or on another machine: it continues from the file.
- *exact* files have keys and values: the video continues bit for bit. *compact* files are small: keys and values are computed again, so the video is close but not the same.
- *autosave* in a sampler (an advanced input) writes such a file after its segment, and after an interrupt.
- The video is in the file, too. *Save Long Video* can write it at any time.`
  return {
    nodes: [loadDemo, memory,
      prompt(3, 'Prompt', 'A meadow under a clear sky by day. The camera pans right.', 410, 60),
      sampler(4, 'The first half', 3, 2, 410, 260, { seed: 11 }),
      [5, 'ContextForcingSaveMemory', { memory: ['4', 0], filename_prefix: SAVED, form: 'exact' },
        800, 60, 560, 110, undefined, 'green'],
      saveVideo(6, ['4', 0], 800, 260, 'video/today')],
    note: [note, 20, 540, 340, 430],
  }
}

function continueTomorrow() {
  const note = `## Begin today, continue tomorrow: tomorrow
**Load Memory** reads the file that **Tutorial 6** wrote. Nothing of the first half is generated again, also after a restart of ComfyUI. Run Tutorial 6 once if the file does not exist yet.
- *file* has the latest memory on top; key R refreshes the list.
- *What it holds* tells its seconds and its remembered frames. The student must be the one that made it.
- The video begins with the first half: Save Long Video writes the whole film.
- With the first half's prompt and seed it would be the same video as without the pause.`
  return {
    nodes: [loadDemo,
      [2, 'ContextForcingLoadMemory', { file: `${SAVED}_00001_.safetensors [output]` }, 20, 260, 340, 90,
        undefined, 'green'],
      [3, 'PreviewAny', { source: ['2', 1] }, 20, 420, 340, 190, 'What it holds'],
      prompt(4, 'Prompt', 'A meadow under a clear sky by day. The camera pans left.', 410, 60),
      sampler(5, 'The second half', 4, 2, 410, 260, { seed: 11 }),
      saveVideo(6, ['5', 0], 800, 60, 'video/tomorrow')],
    note: [note, 20, 680, 340, 400],
  }
}

export const TUTORIALS = {
  'Tutorial 1 - three prompts': demoChain,
  'Tutorial 2 - a storyboard': demoStoryboard,
  'Tutorial 3 - three futures': demoBranch,
  'Tutorial 4 - from a picture': demoStartImage,
  'Tutorial 5 - continue a clip': demoContinueVideo,
  'Tutorial 6 - save a memory': saveToday,
  'Tutorial 7 - continue it': continueTomorrow,
}
