// Two places where ComfyUI's page does not follow what the pack says: inputs marked advanced, the order of templates.

import { app } from '../../scripts/app.js'
import { api } from '../../scripts/api.js'

const FOLDER = decodeURIComponent(new URL(import.meta.url).pathname.split('/').at(-2))

const shown = new Set() // a function per node: hides or shows its advanced inputs

/**
 * The page sets `widget.options.advanced`, which the classic renderer does not read. `widget.advanced` gives its menu
 * "Show Advanced", `widget.hidden` takes the widget's place away, too. Hidden values are saved and sent.
 */
function collapse(node) {
  const advanced = (node.widgets ?? []).filter(({ options }) => options?.advanced)
  if (!advanced.length) return
  // The page may watch this property already.
  const own = Object.getOwnPropertyDescriptor(node, 'showAdvanced') ?? { value: node.showAdvanced }
  let plain = own.value
  const get = () => (own.get ? own.get.call(node) : plain)
  const update = () => {
    for (const widget of advanced) widget.hidden = !window.LiteGraph.vueNodesMode && !get()
  }
  Object.defineProperty(node, 'showAdvanced', { get, configurable: true, enumerable: true, set(value) {
    if (own.set) own.set.call(node, value)
    else plain = value
    update()
  } })
  for (const widget of advanced) widget.advanced = true
  update()
  shown.add(update)
  const removed = node.onRemoved
  node.onRemoved = function (...args) {
    shown.delete(update)
    return removed?.apply(this, args)
  }
  node.setSize?.(node.computeSize())
}

/** ComfyUI lists templates as its file system does. */
function sortTemplates() {
  const get = api.getWorkflowTemplates?.bind(api)
  if (!get) return
  api.getWorkflowTemplates = async () => {
    const templates = await get()
    templates[FOLDER]?.sort()
    return templates
  }
}

app.registerExtension({
  name: 'ContextForcing.Shown',
  setup() {
    sortTemplates()
    // The page changes its mode after this event.
    app.ui?.settings?.addEventListener('Comfy.VueNodes.Enabled.change', () => setTimeout(() => shown.forEach((update) => update())))
  },
  nodeCreated(node) {
    const isOurs = node.comfyClass?.startsWith('ContextForcing')
    const areAllShown = app.extensionManager?.setting?.get('Comfy.Node.AlwaysShowAdvancedWidgets')
    if (isOurs && !areAllShown) collapse(node)
  },
})
