// {text, outline, edits: [[function of storyboard_text.js, ...arguments]]} on stdin -> the texts, as JSON.
import fs from 'node:fs'

import * as model from '../../web/storyboard_text.js'

const { text, outline, edits } = JSON.parse(fs.readFileSync(0, 'utf-8'))
const edit = ([name, ...rest]) => (name === 'tail' ? model.tail(outline, ...rest) : model[name](text, outline, ...rest))
console.log(JSON.stringify(edits.map(edit)))
