"""Context Forcing: long videos that stay consistent.

One folder, two lives: ComfyUI imports it by path as a custom node, pip installs it as `context_forcing`.
Nothing is imported here, so that the memory, the model and the trainer work without ComfyUI.
"""

import logging

WEB_DIRECTORY = "./web"


async def comfy_entrypoint():
    """ComfyUI's way in: the node pack as a V3 extension."""
    try:
        from .nodes import ContextForcingExtension
    except Exception:
        # ComfyUI reports a failed entry point in one line without a traceback.
        logging.getLogger("context_forcing").exception("Context Forcing nodes could not be loaded")
        raise
    return ContextForcingExtension()
