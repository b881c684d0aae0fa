"""NaN and infinity in a chunk: noticed once a chunk; where they arose is looked for only then, in a repeat.

Noise is a function of seed, frame and step, so that the passes of a chunk can be made again to the same bits.
"""

import itertools
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor, nn

from ..memory.layer_store import LayerSlots, ReleasedMemory
from ..memory.memory import Memory, all_finite
from .attention import Attention, sdpa
from .causal import AttendSelf, Call, TextContext
from .flow import TIMESTEPS

RANGES = {
    torch.float16: "run it in bf16 or fp32 (in ComfyUI --bf16-unet or --fp32-unet)",
    torch.bfloat16: "run it in fp32 (--dtype fp32, in ComfyUI --fp32-unet)",
}
"""What helps where finite weights make values that are not finite."""


class NotFiniteError(ValueError):
    """A chunk is not finite; one line says where that began and what helps."""


def written(kept: Sequence[tuple[Tensor, Tensor] | LayerSlots], first: int) -> Iterator[Tensor]:
    """Keys and values of the frames from `first` on, of what a pass kept per layer."""
    for layer in kept:
        if isinstance(layer, LayerSlots):
            yield from (
                tensor
                for frame, entry in zip(layer.frames, layer.entries)
                for tensor in ((entry.keys, entry.values) if frame >= first else ())
            )
        else:
            yield from layer


class Watch:
    """A Call (causal.py) that looks at what every layer makes; raises NotFiniteError at the first that is not finite.

    It is for one repeat of the passes over `frames`, the chunk after `memory` or remembered frames of it.
    """

    def __init__(self, net: nn.Module, call: Call, memory: Memory, frames: Sequence[int]):
        self.net, self.call, self.memory = net, call, memory
        span, is_next = f"latent frames {frames[0]}-{frames[-1]}", frames[0] >= memory.num_frames
        self.place = f"chunk {frames[0] // memory.config.chunk + 1} ({span})" if is_next else f"remembered {span}"
        self.passing, self.remedy, self.steps = "", "", 0

    def look_at_memory(self) -> None:
        """What the chunk begins from: what is given for it, the prompt, remembered keys and values."""
        memory = self.memory
        if memory.start_latents is not None and not all_finite([memory.start_latents[:, :, : memory.config.chunk]]):
            raise self.error("the start image or clip", "check the file, or encode it in fp32")
        if memory.text is not None and memory.text.numel() and not all_finite([memory.text]):
            raise self.error("the prompt's embeddings", "check the text encoder, or run it in fp32")
        is_released = isinstance(memory, ReleasedMemory)
        layers = [zip(layer.frames, layer.entries) for layer in memory.layers] if is_released else ()
        held = itertools.chain(memory.remembered.items(), *layers)
        for frame, entry in held:
            if not all_finite([entry.keys, entry.values]):
                raise self.error(
                    f"what the memory already held of latent frame {frame}", "go on from an earlier memory"
                )

    def error(self, what: str, remedy: str) -> NotFiniteError:
        """The one line."""
        return NotFiniteError(
            f"{self.place}{self.passing}: NaN or infinity in {what}; {remedy}. Nothing of it was kept"
        )

    def nothing_found(self) -> NotFiniteError:
        """The error after a repeat in which all was finite."""
        self.passing = ""
        return self.error("it, but not in a repeat of its passes", "generate again; if it recurs, check the device")

    def __call__(self, module: nn.Module, function: Callable, *args):
        return (self._pass if module is self.net else self._block)(module, function, *args)

    def _pass(
        self, net: nn.Module, function: Callable, x: Tensor, timestep: Tensor, text: TextContext,
        attend_self: AttendSelf, attention: Attention, _: Call,
    ) -> Tensor:  # fmt: skip
        self.steps += 1
        sigma = float(timestep[0, -1]) / TIMESTEPS  # the chunk's last frame is never a given one
        self.passing = f", step {self.steps} (noise level {sigma:.4g})" if sigma else ", the commit pass"
        helps = [RANGES.get(x.dtype, "check the student file and the strength of its LoRAs")]
        self.remedy = " or ".join(helps + ["use attention sdpa"] * (attention is not sdpa))
        if not all_finite([x]):
            raise self.error("its latents before the pass", "check the start image, journal or memory they came from")

        def attend(layer: int, *qkv: Tensor) -> Tensor:
            for name, tensor in zip(("queries", "keys", "values"), qkv):
                self._look(tensor, f"the {name} of layer blocks.{layer}", f"blocks.{layer}.")
            out = attend_self(layer, *qkv)
            self._look(out, f"the self-attention of layer blocks.{layer}")
            return out

        flow = self.call(net, function, x, timestep, text, attend, attention, self)
        self._look(flow, "the output of layer head", "head.")
        return flow

    def _block(
        self, block: nn.Module, function: Callable, layer: int, x: Tensor, tproj: Tensor, text: TextContext, *others
    ) -> Tensor:
        name = f"blocks.{layer}"
        if layer == 0:
            self._look(x, "the output of layer patch_embedding", "patch_embedding.")
            self._look(tproj, "the output of layer time_projection", "time_embedding.", "time_projection.")
        for tensor in (text.keys[layer], text.values[layer]):
            self._look(tensor, f"the prompt in layer {name}", "text_embedding.", f"{name}.cross_attn.")
        out = self.call(block, function, layer, x, tproj, text, *others)
        self._look(out, f"the output of layer {name}", f"{name}.")
        return out

    def _look(self, tensor: Tensor, what: str, *makers: str) -> None:
        """Raise for a tensor that is not finite; `makers` are how the names of the weights that made it begin."""
        if all_finite([tensor]):
            return
        for name, weight in itertools.chain(self.net.named_parameters(), self.net.named_buffers()):
            if name.startswith(makers) and weight.is_floating_point() and not all_finite([weight.float()]):
                raise self.error(
                    f"{what} and in the weight {name}",
                    "the student file or a LoRA is damaged, check them or use another copy",
                )
        raise self.error(f"{what}, not in its weights", self.remedy)
