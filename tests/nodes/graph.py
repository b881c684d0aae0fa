"""Prompts in API format, built and read back by host tests."""

import torch
from safetensors.torch import load_file

from .host import Run

PROMPTS = (
    "A meadow under a clear sky by day. The camera pans right.",
    "A meadow under a clear sky at dusk. The camera stays.",
    "A meadow under a clear sky at dusk. The camera pans left.",
)
CHUNK_SECONDS = 0.75
CHUNK_FRAMES = 3


class Graph:
    """A prompt in API format, built node by node."""

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
        return self.add("SaveLatent", samples=[sampler, 1], filename_prefix="latents/test")


def latents(host, run: Run, *saved: str) -> torch.Tensor:
    """What SaveLatent nodes wrote, one after the other in time."""
    files = [host.output_path(run.outputs[node]["latents"][0]) for node in saved]
    return torch.cat([load_file(file)["latent_tensor"] for file in files], dim=2)


def only(prompt: dict, class_type: str) -> str:
    (node,) = nodes(prompt, class_type)
    return node


def nodes(prompt: dict, class_type: str) -> list[str]:
    """In the order of their ids, which is that of the chain."""
    return sorted((node for node, entry in prompt.items() if entry["class_type"] == class_type), key=int)


def succeeded(run: Run) -> Run:
    assert run.end == "execution_success", run.all(run.end)
    return run


def failure(host, graph: Graph) -> dict:
    run = host.run(graph.prompt)
    assert run.end == "execution_error"
    return run.all("execution_error")[0]
