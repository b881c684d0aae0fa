"""Tiny model files in the layouts and under the names that the templates for published students expect.

python tests/nodes/tiny_models.py COMFYUI_BASE_DIRECTORY      writes models/ and input/example.png for make_workflows.py
"""

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import torch
from PIL import Image
from safetensors.torch import save_file

from context_forcing.model.checkpoints.published import published_student
from context_forcing.model.checkpoints.student import write_student

TESTS = Path(__file__).parents[1]
SIZES = dict(dim=128, ffn_dim=64, num_heads=1, num_layers=2, text_dim=4096)
"""ComfyUI takes dim / 128 for the number of heads."""
LORA = "wan_1.3b_lora.safetensors"


def _module(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"tiny_{path.stem}", path)
    assert spec and spec.loader
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def write_tiny_models(base: Path) -> None:
    """Write the files below a base directory of ComfyUI."""
    shared, published = _module(TESTS / "conftest.py"), _module(TESTS / "model" / "checkpoints" / "published.py")
    folders = {name: base / "models" / name for name in ("diffusion_models", "text_encoders", "vae", "loras")}
    for folder in (*folders.values(), base / "input"):
        folder.mkdir(parents=True, exist_ok=True)
    students, net = folders["diffusion_models"], shared._make_net(**SIZES)
    state = net.state_dict()
    layouts = {row.name: row.make for row in published.ROWS}
    for layout, name in (("Self-Forcing", "self_forcing_dmd.pt"), ("Context Forcing", "context_forcing.pt")):
        layouts[layout](students, state).rename(students / name)
    write_student(students / "longlive.safetensors", state, SIZES["num_heads"], published_student("longlive").card)
    # As ComfyUI's repackaged file: its own metadata, no card.
    config = {"config": json.dumps({"transformer": {"causal_ar": True}})}
    save_file(published.cast(state, torch.float16), students / "causal_forcing-framewise.safetensors", config)

    words = {"spiece_model": torch.frombuffer(bytearray(shared.make_spiece()), dtype=torch.uint8)}
    umt5 = shared.scaled_fp8(shared.make_umt5()) | words
    save_file(umt5, folders["text_encoders"] / "umt5_xxl_fp8_e4m3fn_scaled.safetensors")
    save_file(shared.make_wan_vae(), folders["vae"] / "wan_2.1_vae.safetensors")
    generator = torch.Generator().manual_seed(2)
    low_rank = {
        f"diffusion_model.blocks.{block}.self_attn.q.lora_{part}.weight": torch.randn(size, generator=generator) * 0.1
        for block in range(SIZES["num_layers"])
        for part, size in (("A", (4, SIZES["dim"])), ("B", (SIZES["dim"], 4)))
    }
    save_file(low_rank, folders["loras"] / LORA)
    Image.linear_gradient("L").resize((96, 64)).convert("RGB").save(base / "input" / "example.png")


if __name__ == "__main__":
    write_tiny_models(Path(sys.argv[1]))
