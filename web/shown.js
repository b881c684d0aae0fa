// Two places where ComfyUI's page does not follow what the pack says: inputs marked advanced, the order of templates.

import { app } from '../../scripts/app.js'
import { api } from '../../scripts/api.js'

const FOLDER = decodeURIComponent(new URL(import.meta.url).pathname.split('/').at(-2))

/**
 * The page sets `widget.options.advanced`, which the classic renderer does not read. `widget.advanced` gives its menu
 * "Show Advanced", `widget.hidden` takes the widget's place away, too. Hidden values are saved and sent.
 */
function collapse(node) {
  const advanced = (node.widgets ?? []).filter(({ options }) => options?.advanced)
  for (const widget of advanced) {
    widget.advanced = true
    const get = () => !window.LiteGraph.vueNodesMode && !node.showAdvanced
    Object.defineProperty(widget, 'hidden', { get, set() {}, configurable: true, enumerable: true })
  }
  if (advanced.length) node.setSize?.(node.computeSize())
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
  setup: sortTemplates,
  nodeCreated(node) {
    const isOurs = node.comfyClass?.startsWith('ContextForcing')
    const areAllShown = app.extensionManager?.setting?.get('Comfy.Node.AlwaysShowAdvancedWidgets')
    if (isOurs && !areAllShown) collapse(node)
  },
})
