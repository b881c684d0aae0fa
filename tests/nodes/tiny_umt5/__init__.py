"""A custom node pack for test servers: ComfyUI's Load CLIP takes the tiny UMT5 of tests/conftest.py, too.

ComfyUI recognises UMT5-XXL by its width of 10240, and takes its sizes from a file of its own.
"""

import comfy.sd

SIZES = {"num_layers": 2, "d_ff": 16, "num_heads": 2, "d_kv": 8, "vocab_size": 256}
detect, load = comfy.sd.detect_te_model, comfy.sd.load_clip


def load_clip(ckpt_paths, embedding_directory=None, clip_type=None, model_options=None, **options):
    sizes = {"umt5xxl_model_config": SIZES, **(model_options or {})}
    return load(ckpt_paths, embedding_directory, clip_type, sizes, **options)


comfy.sd.detect_te_model = lambda state: comfy.sd.TEModel.T5_XXL if "spiece_model" in state else detect(state)
comfy.sd.load_clip = load_clip
NODE_CLASS_MAPPINGS = {}
