"""The search for the origin of NaN and infinity in a chunk, in a repeat of its passes.

Noise is a function of seed, frame and step, so that a repeat computes the same values bit for bit.
"""

import itertools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ..memory.memory import Memory, all_finite
from ..memory.references import frame_name
from .attention import sdpa
from .causal import ModuleRunner, WanNet
from .flow import TIMESTEPS
from .network import Network

REMEDIES = {
    torch.float16: "run it in bf16 or fp32 (in ComfyUI --bf16-unet or --fp32-unet)",
    torch.bfloat16: "run it in fp32 (--dtype fp32, in ComfyUI --fp32-unet)",
}
"""By dtype, for values that overflow although all weights are finite."""


class NotFiniteError(ValueError):
    """A chunk is not finite. The message names the origin and a remedy."""


class FiniteCheck:
    """A ModuleRunner that checks the output of every layer and raises NotFiniteError at the first that is not finite.

    It is for one repeat of the passes over `frames`, the chunk after `memory` or remembered frames of it.
    """

    def __init__(self, network: Network, memory: Memory, frames: Sequence[int]):
        self.network, self.memory = network, memory
        self.names = {block: f"blocks.{layer}" for layer, block in enumerate(network.net.blocks)}
        span, is_next = f"latent frames {frames[0]}-{frames[-1]}", frames[0] >= memory.num_frames
        self.place = f"chunk {frames[0] // memory.config.chunk + 1} ({span})" if is_next else f"remembered {span}"
        if frames[0] < 0:
            self.place = frame_name(frames[0], len(memory.references))
        self.current_pass, self.num_passes = "", 0
        remedy = REMEDIES.get(network.dtype, "check the student file and the strength of its LoRAs")
        self.remedy = remedy + " or use attention sdpa" * (network.attention is not sdpa)

    def check_memory(self) -> None:
        """Check the start latents, the prompt, and remembered keys and values."""
        memory = self.memory
        if memory.start_latents is not None and not all_finite([memory.start_latents[:, :, : memory.config.chunk]]):
            raise self.error("the start image or clip", "check the file, or encode it in fp32")
        if memory.text is not None and memory.text.numel() and not all_finite([memory.text]):
            raise self.error("the prompt's embeddings", "check the text encoder, or run it in fp32")
        for frame, kv in memory.store.frame_kvs():
            if not all_finite(kv.tensors()):
                name = frame_name(frame, len(memory.references))
                raise self.error(f"the remembered {name}", "continue from an earlier memory")

    def error(self, what: str, remedy: str) -> NotFiniteError:
        return NotFiniteError(f"{self.place}{self.current_pass}: NaN or infinity in {what}; {remedy}; nothing was kept")

    def not_reproduced(self) -> NotFiniteError:
        """The error for a repeat in which all values were finite."""
        self.current_pass = ""
        return self.error("it, but not in a repeat", "generate again; if it happens again, check the device")

    def __call__(self, module: WanNet, function: Callable, *args):
        return (self._pass if module is self.network.net else self._block)(module, function, *args)

    def _pass(self, net: WanNet, function: Callable, x: Tensor, timestep: Tensor, text, attend_self):
        self.num_passes += 1
        sigma = float(timestep[0, -1]) / TIMESTEPS  # the last frame is never a start frame
        self.current_pass = f", step {self.num_passes} (noise level {sigma:.4g})" if sigma else ", the commit pass"
        if not all_finite([x]):
            raise self.error("its latents before the pass", "check the start image, journal or memory they came from")
        for name, *of_text in zip(self.names.values(), text.keys, text.values):
            for tensor in of_text:
                self._check(tensor, f"the prompt in layer {name}", "text_embedding.", f"{name}.cross_attn.")

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor, inside: ModuleRunner) -> Tensor:
            name = self.names[net.blocks[layer]]
            for what, tensor in zip(("queries", "keys", "values"), (q, k, v)):
                self._check(tensor, f"the {what} of layer {name}", f"{name}.")
            out = attend_self(layer, q, k, v, inside)
            self._check(out, f"the self-attention of layer {name}")
            return out

        out = self.network.run(net, function, x, timestep, text, attend)
        if isinstance(out, Tensor):
            self._check(out, "the output of layer head", "head.")
        return out

    def _block(self, block: WanNet, function: Callable, x: Tensor, tproj: Tensor, *others):
        name = self.names[block]
        if block is self.network.net.blocks[0]:
            self._check(x, "the output of layer patch_embedding", "patch_embedding.")
            self._check(tproj, "the output of layer time_projection", "time_embedding.", "time_projection.")
        out = self.network.run(block, function, x, tproj, *others)
        # The last layer of a pass for keys only gives keys and values.
        made = {"output": out} if isinstance(out, Tensor) else dict(zip(("keys", "values"), out))
        for what, tensor in made.items():
            self._check(tensor, f"the {what} of layer {name}", f"{name}.")
        return out

    def _check(self, tensor: Tensor, what: str, *prefixes: str) -> None:
        """Raise if a tensor is not finite. `prefixes` are those of the weights that it depends on."""
        if all_finite([tensor]):
            return
        net = self.network.net
        for name, weight in itertools.chain(net.named_parameters(), net.named_buffers()):
            if name.startswith(prefixes) and weight.is_floating_point() and not all_finite([weight.float()]):
                remedy = "the student file or a LoRA is damaged, check them or use another copy"
                raise self.error(f"{what} and in the weight {name}", remedy)
        raise self.error(f"{what}, not in its weights", self.remedy)
