"""One random Wan network, sampled by the nodes from a ComfyUI MODEL and by the headless sampler."""

import folder_paths
import torch
from safetensors.torch import save_file

import nodes

SIZES = dict(dim=256, ffn_dim=320, num_heads=2, num_layers=2, text_dim=4096, text_len=512)
FP8 = torch.float8_e4m3fn
ROUNDING = 1e-5
"""Float32 sums in another order, over three chunks of four steps. A LoRA of these tests moves latents by 6e-3."""


def difference(result: torch.Tensor, expected: torch.Tensor) -> float:
    """Norm of the difference over the norm of what is expected."""
    return ((result - expected).norm() / expected.norm()).item()


class Bench:
    """A random network, its weights and a prompt."""

    def __init__(self, make_net, folder):
        self.make_net, self.folder = make_net, folder
        self.state = make_net(**SIZES).state_dict()
        text = torch.randn((1, 512, 4096), generator=torch.Generator().manual_seed(3))
        text[:, 7:] = 0
        self.positive = [[text, {"pooled_output": None}]]
        self.plain, self.memory = self.headless(self.state)
        self.student = self.memory.student
        for kind in ("diffusion_models", "loras"):
            folder_paths.add_model_folder_path(kind, str(folder))

    def save(self, name: str, state: dict, metadata=None) -> str:
        save_file({key: value.contiguous() for key, value in state.items()}, self.folder / name, metadata)
        return name

    def load(self, state=None, metadata=None, weight_dtype="default"):
        """A MODEL of ComfyUI's own loader; by default of the plain weights."""
        name = self.save("student.safetensors", self.state if state is None else state, metadata)
        return nodes.UNETLoader().load_unet(name, weight_dtype)[0]

    def empty_memory(self, model):
        from context_forcing.nodes.memory import ContextForcingMemory

        return ContextForcingMemory.execute(model, 48, 32, "as trained", 1, 2, 4, -1.0).result[0]

    def run(self, model, memory=None, chunks=3, positive=None, **options):
        """(latents, memory) of a segment, by the nodes."""
        from context_forcing.nodes.sampler import ContextForcingSampler

        memory = memory or self.empty_memory(model)
        positive = positive or self.positive
        after, latent = ContextForcingSampler.execute(model, positive, memory, 0.75 * chunks, 5, **options).result
        return latent["samples"], after

    def headless(self, state: dict, dtype=torch.float32, shift=5.0, commit: dict | None = None, **options):
        """(latents, memory) of three chunks, by the headless sampler. `commit` are weights for the commit pass.

        `options` are those of the sampler (SamplerOptions).
        """
        from context_forcing.memory import empty_memory
        from context_forcing.memory.config import MemoryConfig
        from context_forcing.model.codecs.base import denormalise
        from context_forcing.model.config import StudentCard
        from context_forcing.model.fingerprint import fingerprint
        from context_forcing.model.network import Network
        from context_forcing.model.sampler import SamplerOptions, make_sampler
        from context_forcing.model.segment import generate_segment

        def network_of(state, commit=None):
            net = self.make_net(**SIZES)
            net.load_state_dict({key: value.float() for key, value in state.items()})
            return Network(net.to(dtype), torch.device("cpu"), dtype, commit=commit)

        second = network_of(commit) if commit else None
        network, card = network_of(state, second), StudentCard(shift=shift)
        student = fingerprint(network.net, commit=second and second.net)
        sampler_of = lambda text: make_sampler(network, card, text, SamplerOptions(**options), student)
        *_, memory = generate_segment(
            sampler_of, empty_memory(MemoryConfig(sink=1, slow=2, fast=4), (16, 4, 6)), self.positive[0][0], prompt="",
            seed=5, num_chunks=3, sigmas=card.sigmas,
        )  # fmt: skip
        return denormalise(torch.cat(memory.latent_chunks, dim=2)), memory
