// Words of the strip in the page's language.

const EN = {
  total: (count, seconds, chunk) => `${count} segments, ${seconds} s, ${chunk} s per chunk`,
  todo: (count) => `${count} to be made`,
  states: {
    made: 'Made in the last run. ComfyUI takes it from its cache as long as nothing before it changes.',
    cached: 'The last run took it from the cache.',
    running: 'It is being made.',
    todo: 'The next run makes it, unless ComfyUI has it from before this page was opened.',
  },
  wrong: (count) => (count === 1 ? '1 wrong line. Change it in the text.' : `${count} wrong lines. Change them in the text.`),
  line: (number) => `line ${number}`,
  change: 'What happens to the remembered frames when this prompt begins. Click: the next choice; Shift: back.',
  blend: 'Chunks over which the old prompt fades into this one. Click: one more; Shift: one less.',
  seed: 'The seed of this line.',
  drag: 'Drag: another length, in whole chunks. Later segments move with it; with Shift, the next one gives or takes.',
  branch: 'Continue from here: adds a storyboard that begins with the memory after this segment.',
  branched: 'The output branch has the memory after this segment.',
  noReach: 'A run shows here which frames are remembered.',
  reach: (segment, seconds, parts) => `After segment ${segment} the memory reaches back ${seconds} s: ${parts}`,
  earlier: (count) => `${count} frames before this storyboard`,
  wired: 'The text comes over a wire. The strip shows only text that is written in this node.',
  offline: 'The server does not answer, so the strip shows no segments.',
}

const ZH = {
  total: (count, seconds, chunk) => `${count} 段，${seconds} 秒，每块 ${chunk} 秒`,
  todo: (count) => `${count} 段待生成`,
  states: {
    made: '上次运行生成。只要之前的内容不变，ComfyUI 就会从缓存中取用。',
    cached: '上次运行取自缓存。',
    running: '正在生成。',
    todo: '下次运行时生成，除非 ComfyUI 在打开此页面之前已缓存。',
  },
  wrong: (count) => `${count} 行有误，请在文本中修改。`,
  line: (number) => `第 ${number} 行`,
  change: '此提示词开始时如何处理记住的帧。点击：下一个选项；按住 Shift：上一个。',
  blend: '旧提示词过渡到此提示词所用的块数。点击：加一；按住 Shift：减一。',
  seed: '此行的种子。',
  drag: '拖动以改变时长，按整块取整。后面的片段随之移动；按住 Shift 时由下一段让出或接收。',
  branch: '从此处继续：添加一个从该片段之后的记忆开始的分镜节点。',
  branched: '输出“分支”给出该片段之后的记忆。',
  noReach: '运行后，这里显示记住了哪些帧。',
  reach: (segment, seconds, parts) => `第 ${segment} 段之后，记忆可回溯 ${seconds} 秒：${parts}`,
  earlier: (count) => `此分镜之前的 ${count} 帧`,
  wired: '文本来自连线。片段条只显示写在此节点中的文本。',
  offline: '服务器没有回应，无法显示片段。',
}

/** The words for a locale such as `en` or `zh-TW`. */
export function wordsFor(locale) {
  return String(locale).startsWith('zh') ? ZH : EN
}
