"""One segment: continue a memory under a prompt."""

import weakref
from collections.abc import Callable

import comfy.model_management as mm
import torch
from comfy_api.latest import io
from torch import Tensor

from ..memory.memory import CHANGES, Memory
from ..memory.stores import KV_PLACEMENTS
from ..model.codecs.backbone import backbone_of
from ..model.fallback import Fallback
from ..model.sampler import COMMIT_ATTENDS, CausalSampler, SamplerOptions, chunks_for, make_sampler, working_bytes
from ..model.segment import generate_segment
from ..model.units import latent_seconds
from .demo import WORDS
from .handle import Inputs, MemoryHandle, MemoryType
from .model_access import StudentModel
from .patches import attention_of, ignored_patches
from .progress import SegmentProgress, preview_of
from .save_load import keep_memory, write_autosave
from .segment_ui import segment_ui
from .shared import ADVANCED, CATEGORY, attention_input, kv_dtype_input, log, seed_input, storage_inputs

AS_CARD = "card"


def text_of(positive: io.Conditioning.Type) -> Tensor:
    """Embedding of the one prompt of a CONDITIONING, [1, L, 4096]. Options without effect are logged.

    Raises ValueError for several prompts.
    """
    prompts = sum(conditioning.shape[0] for conditioning, _ in positive)
    if prompts != 1:
        raise ValueError(f"positive: {prompts} prompts; give one, chain another node for the next")
    text, options = positive[0]
    if ignored := sorted(set(options) - {"pooled_output", WORDS}):
        log.warning("positive: %s of the conditioning has no effect in this sampler", ", ".join(ignored))
    return text


def make_room(student: StudentModel, memory: Memory, layout: str, kv_dtype: str) -> None:
    """Load the student, with device memory free for keys, values and activations of a rollout."""
    network = student.network
    needed = {name: working_bytes(network, memory, name, kv_dtype=kv_dtype) for name in KV_PLACEMENTS}
    total = mm.get_total_memory(network.device)
    if needed[layout] > total:
        sizes = ", ".join(f"{name} {size / 1e9:.1f} GB" for name, size in needed.items())
        log.warning(
            f"memory: keys, values and one pass need {needed[layout] / 1e9:.1f} GB beside the weights, the device has"
            f" {total / 1e9:.1f} GB; by the sampler's layout: {sizes}"
        )
    present = 0 if layout == "from RAM" else memory.num_bytes_on(network.device)
    mm.load_models_gpu([student.model, *student.commit], memory_required=needed[layout] - present)


def fallback_of(student: StudentModel, layout: str, kv_dtype: str) -> Fallback:
    """What an out-of-memory does: ComfyUI frees its caches and makes room for the next layout."""

    def make_room_again(memory: Memory, layout: str) -> None:
        mm.soft_empty_cache()
        make_room(student, memory, layout, kv_dtype)

    return Fallback(layout, "layout", make_room_again)


def prepare_sampler(
    student: StudentModel, memory: Memory, attention: str = "sdpa", layout: str = "at once",
    commit_attends: str = AS_CARD, kv_dtype: str = "auto",
) -> Callable[[Tensor], CausalSampler]:  # fmt: skip
    """Load the student for a memory. The result makes a sampler of a prompt's embedding (SamplerOptions)."""
    if ignored := sorted(set(ignored_patches(student.model))):
        log.warning("model: these patches have no effect in this sampler: %s", ", ".join(ignored))
    make_room(student, memory, layout, kv_dtype)
    function = attention_of(student.model, attention, student.network)
    attends = None if commit_attends == AS_CARD else commit_attends
    options = SamplerOptions(attention=function, commit_attends=attends, kv_placement=layout, kv_dtype=kv_dtype)
    return lambda text: make_sampler(student.network, student.card, text, options, student.fingerprint)


class ContextForcingSampler(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="ContextForcingSampler", display_name="Context Forcing Sampler", category=CATEGORY,
            description="Continues a video by one segment under one prompt. In a chain, every sampler continues the"
            " memory of the sampler before.",
            search_aliases=["rollout", "long video", "causal", "self forcing", "chain"],
            inputs=[
                io.Model.Input("model", tooltip="Student model."),
                io.Conditioning.Input("positive", tooltip="The prompt of this segment."),
                MemoryType.Input("memory", tooltip="An empty memory, or the memory of the segment before."),
                io.Float.Input("seconds", default=3.0, min=0.05, max=3600.0, step=0.05,
                    tooltip="Length of this segment, rounded up to whole chunks (0.75 s at 16 frames per second)."),
                seed_input("Noise depends on the seed and the place in the video. Use one seed for the whole chain."),
                attention_input(),
                io.Combo.Input("commit_attends", options=[AS_CARD, *COMMIT_ATTENDS], default=AS_CARD, **ADVANCED,
                    tooltip="Which remembered frames a finished chunk attends to while its keys are computed. card: as"
                    " the student's card says. no sink: slow and fast. fast only: fast. itself: none."),
                io.Combo.Input("change", options=list(CHANGES), default="keep", optional=True,
                    tooltip="What happens to the remembered frames when this prompt begins. keep: nothing. recache:"
                    " their keys and values are computed again under the new prompt. flush: only the video's first"
                    " frames and the last chunk stay. cut: a new scene; only the video's first frames stay."
                    " cut_new_sink: a new scene; no frame stays. recache and flush need another prompt than before."),
                io.Int.Input("blend", default=0, min=0, max=1000, optional=True,
                    tooltip="Chunks (0.75 s at 16 frames per second) over which the old prompt fades into this one, at"
                    " most all but the last of the segment. 0: at once."),
                *storage_inputs(),
                kv_dtype_input(),
            ],
            outputs=[
                MemoryType.Output("memory", tooltip="The video so far and the remembered frames."),
                io.Latent.Output("latent", tooltip="Latents of this segment only."),
            ],
        )  # fmt: skip

    @classmethod
    def validate_inputs(cls, attention: str = "sdpa") -> bool:
        """A graph may name an attention that is not installed here. The sampler then says how to get it."""
        return True

    @classmethod
    def execute(
        cls, model: io.Model.Type, positive: io.Conditioning.Type, memory: MemoryHandle, seconds: float, seed: int,
        attention: str = "sdpa", commit_attends: str = AS_CARD, change: str = "keep", blend: int = 0,
        keep_in: str = "RAM", autosave: bool = False, layout: str = "at once", kv_dtype: str = "auto",
    ) -> io.NodeOutput:  # fmt: skip
        student, text, before = StudentModel.of(model), text_of(positive), memory.memory
        card, chunk = student.card, before.config.chunk
        if keep_in == "compact":
            before.check_supports("compact")
        num_chunks = chunks_for(seconds, card.fps, chunk)
        rounded = latent_seconds(num_chunks * chunk, card.fps)
        if abs(rounded - seconds) > 1e-6:
            log.info("seconds: %g s is rounded up to %g s, whole chunks", seconds, rounded)
        segment = {
            "prompt": positive[0][1].get(WORDS, ""), "seed": seed, "num_chunks": num_chunks, "change": change,
            "blend": blend,
        }  # fmt: skip
        kept = {"commit_attends": commit_attends, "keep_in": keep_in, "autosave": autosave, "kv_dtype": kv_dtype}
        settings = segment | kept | {"attention": attention, "layout": layout}
        inputs = Inputs(model=weakref.ref(model), text=text, settings=settings)
        if found := memory.find(inputs):
            log.info("memory: another node has this segment already; it is not made again")
            handle, samples, shown = found
            return io.NodeOutput(handle, {"samples": samples}, ui=shown)

        sampler_of = prepare_sampler(student, before, attention, layout, commit_attends, kv_dtype)
        progress = SegmentProgress(before, num_chunks, card.fps, preview_of(backbone_of(card.base).preview_vae))
        chunks = generate_segment(
            sampler_of, before, text, sigmas=card.sigmas, fallback=fallback_of(student, layout, kv_dtype), **segment
        )
        after, picture, clips, saved, finished = before, None, memory.clips, memory.autosave, 0
        try:
            for finished, after in enumerate(chunks, 1):
                picture = progress.show(after, finished)
        finally:
            # Also after an interrupt or an error.
            clips = progress.show_film(clips, is_finished=finished == num_chunks)
            if autosave and after is not before:
                saved = write_autosave(after, saved, is_finished=finished == num_chunks)
        latents = torch.cat(after.latent_chunks[-num_chunks:], dim=2)
        samples = model.model.process_latent_out(latents).to(mm.intermediate_device())
        handle = MemoryHandle.of(keep_memory(after, keep_in, before), before, clips, saved)
        shown = segment_ui(after, num_chunks, card.fps, picture)
        memory.remember(inputs, handle, samples, shown)
        return io.NodeOutput(handle, {"samples": samples}, ui=shown)
