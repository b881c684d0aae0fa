"""Prompts in API format, built and read back by host tests."""

import io
import os
import subprocess
import sys
from pathlib import Path

import torch
from PIL import Image
from safetensors.torch import load_file

from .host import ONE_THREAD, Host, Run

PROMPTS = (
    "A meadow under a clear sky by day. The camera pans right.",
    "A meadow under a clear sky at dusk. The camera stays.",
    "A meadow under a clear sky at dusk. The camera pans left.",
)
CHUNK_SECONDS = 0.75
CHUNK_FRAMES = 3
FOLDER = "context_forcing"


class Graph:
    """A prompt in API format, built node by node. Methods return the id of the node."""

    def __init__(self):
        self.prompt = {}

    def add(self, class_type: str, **inputs) -> str:
        node = str(len(self.prompt) + 1)
        self.prompt[node] = {"class_type": class_type, "inputs": inputs}
        return node

    def memory(self, model: str, **settings) -> str:
        as_trained = {"width": 0, "height": 0, "policy": "as trained"}
        as_trained |= {"sink": -1, "slow": -1, "fast": -1, "threshold": -1.0}
        return self.add("ContextForcingMemory", model=[model, 0], **(as_trained | settings))

    def sampler(
        self, model: str, text: str, memory: str, seconds: float = CHUNK_SECONDS, seed: int = 7, **settings
    ) -> str:
        inputs = {"model": [model, 0], "positive": [text, 0], "memory": [memory, 0]}
        return self.add("ContextForcingSampler", **inputs, seconds=seconds, seed=seed, **settings)

    def text(self, loader: str, prompt: str = PROMPTS[0]) -> str:
        return self.add("CLIPTextEncode", clip=[loader, 1], text=prompt)

    def save(self, sampler: str) -> str:
        """Save a sampler's latents, for `latents`."""
        return self.add("SaveLatent", samples=[sampler, 1], filename_prefix="latents/test")

    def save_memory(self, source: str, form: str = "exact", prefix: str = "test") -> str:
        """Save a memory, for `memory_file` and `film`."""
        return self.add("ContextForcingSaveMemory", memory=[source, 0], filename_prefix=f"{FOLDER}/{prefix}", form=form)

    def show_text(self, node: str) -> str:
        """Show a node's second output, for `text_shown`."""
        return self.add("PreviewAny", source=[node, 1])


def latents(host: Host, run: Run, *saved: str) -> torch.Tensor:
    """What SaveLatent nodes wrote, one after the other in time."""
    files = [host.output_path(run.outputs[node]["latents"][0]) for node in saved]
    return torch.cat([load_file(file)["latent_tensor"] for file in files], dim=2)


def memory_file(host: Host, run: Run, node: str) -> Path:
    """The file that Save Memory wrote."""
    file = host.base / "output" / text_shown(run, node).split(",")[0]
    assert file.is_file()
    return file


def load_memory_input(host: Host, file: Path) -> str:
    """A file of the output folder as Load Memory lists it."""
    return f"{file.relative_to(host.base / 'output')} [output]"


def film(host: Host, run: Run, node: str) -> torch.Tensor:
    """The normalised latents of a video that Save Memory wrote."""
    return load_file(memory_file(host, run, node))["film"]


def text_shown(run: Run, node: str) -> str:
    return run.outputs[node]["text"][0]


def picture_shown(host: Host, run: Run, node: str) -> Image.Image:
    (shown,) = run.outputs[node]["images"]
    return Image.open(io.BytesIO(host.view(shown)))


def only(prompt: dict, class_type: str) -> str:
    (node,) = nodes(prompt, class_type)
    return node


def nodes(prompt: dict, class_type: str) -> list[str]:
    """In the order of their ids, which is that of the chain."""
    return sorted((node for node, entry in prompt.items() if entry["class_type"] == class_type), key=int)


def succeeded(run: Run) -> Run:
    assert run.end == "execution_success", run.all(run.end)
    return run


def failure(host: Host, graph: Graph) -> dict:
    run = host.run(graph.prompt)
    assert run.end == "execution_error"
    return run.all("execution_error")[0]


def interrupt_at(host: Host, event: str, node: str, value: int | None = None):
    """For Host.run: interrupts at an event of a node, `progress` at a value of it if one is given."""

    def on_event(kind: str, data: dict) -> None:
        if kind == event and data["node"] == node and value in (None, data.get("value")):
            host.post("/interrupt", {})

    return on_event


def command_line(folder: Path, *arguments: object) -> subprocess.CompletedProcess:
    """The command `context-forcing`, in another process."""
    command = [sys.executable, "-c", "from context_forcing.cli import main; main()", *map(str, arguments)]
    env = os.environ | ONE_THREAD
    return subprocess.run(command, cwd=folder, env=env, check=True, capture_output=True, text=True, timeout=300)
