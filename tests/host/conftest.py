"""Tests inside ComfyUI's own Python, without a server: COMFYUI/.venv/bin/python -m pytest tests/host

`pytest` in our own environment runs them through tests/nodes/test_inside_comfyui.py. ComfyUI is $COMFYUI_PATH, or the
folder around the environment of the running Python.
"""

import importlib.util
import os
import sys
from pathlib import Path
from types import ModuleType

import pytest

CHECKOUT = Path(__file__).parents[2]
sys.path.insert(0, os.environ.get("COMFYUI_PATH") or str(Path(sys.prefix).parent))

from comfy.cli_args import args  # noqa: E402

args.cpu = True

import torch  # noqa: E402
from bench import Bench  # noqa: E402


def load(name: str, path: Path, **options) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, path, **options)
    assert spec and spec.loader
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


load("context_forcing", CHECKOUT / "__init__.py", submodule_search_locations=[str(CHECKOUT)])
shared = load("shared_fixtures", CHECKOUT / "tests" / "conftest.py")
make_net, models_dir, spiece = shared.make_net, shared.models_dir, shared.spiece
umt5_state, wan_vae_state = shared.umt5_state, shared.wan_vae_state


@pytest.fixture(scope="session")
def tiny_decoder_state() -> dict[str, torch.Tensor]:
    """ComfyUI knows no other widths."""
    return shared.make_tiny_decoder((256, 128, 64, 64))


@pytest.fixture(scope="session", autouse=True)
def inference_mode():
    """ComfyUI runs nodes in inference mode."""
    with torch.inference_mode():
        yield


@pytest.fixture(scope="session")
def bench(inference_mode, make_net, tmp_path_factory) -> Bench:
    return Bench(make_net, tmp_path_factory.mktemp("models"))
