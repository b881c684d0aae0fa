// Parts that several workflows have. A node: [id, type, inputs, x, y, width, height, title, colour].
// A note: [text, x, y, width, height]. A group: [title, x, y, width, height, colour].

export const memory = (id, model, x, y, inputs = {}, width = 340) => [id, 'ContextForcingMemory', { model, width: 0,
  height: 0, policy: 'as trained', sink: -1, slow: -1, fast: -1, threshold: -1, ...inputs }, x, y, width, 160]
export const storyboard = (id, { model, clip, memory }, text, x, y, inputs = {}) => [id, 'ContextForcingStoryboard',
  { model, clip, memory, text, seed: 7, attention: 'sdpa', keep_in: 'RAM', autosave: false, ...inputs }, x, y, 640, 760,
  'Storyboard', 'cyan']
export const saveVideo = (id, { memory, vae }, x, y, filename_prefix = 'video/context_forcing', width = 560,
  height = 460) => [id, 'ContextForcingSaveVideo', { memory, vae, filename_prefix, fps: 16, scale: 0, crf: 16 }, x, y,
  width, height]
