"""One segment: continue a memory under a prompt."""

from collections.abc import Callable

import comfy.latent_formats
import comfy.model_management as mm
import comfy.utils
import latent_preview
import torch
from comfy_api.latest import io
from PIL import Image

from ..memory.memory import CHANGES, Memory
from ..model.codecs.backbone import backbone_of
from ..model.codecs.base import VAE, denormalise
from ..model.config import StudentCard
from ..model.network import Network
from ..model.sampler import (
    COMMIT_ATTENDS,
    KV_PLACEMENTS,
    CausalSampler,
    SamplerOptions,
    chunks_for,
    make_sampler,
    working_bytes,
)
from ..model.segment import generate_segment
from ..model.units import latent_seconds
from ..video.frames import to_uint8
from .demo import WORDS
from .handle import CATEGORY, MemoryHandle, MemoryType, card_of, log, student_of, wan_network
from .patches import ATTENTIONS, attention_of, compute_dtype, runner_of, warn_of_ignored
from .save_load import PLACES, at_rest, autosaved

PREVIEW_SIDE = 512


def text_of(positive) -> torch.Tensor:
    """The one prompt of a CONDITIONING, [1, L, 4096]; says what else of it has no effect.

    Raises ValueError for several prompts.
    """
    prompts = sum(conditioning.shape[0] for conditioning, _ in positive)
    if prompts != 1:
        raise ValueError(f"positive: {prompts} prompts; a segment has one, chain another sampler for the next")
    text, options = positive[0]
    if ignored := sorted(set(options) - {"pooled_output", WORDS}):
        log.warning("positive: %s of the conditioning has no effect in this sampler", ", ".join(ignored))
    return text


def previewer_of(vae: VAE | None) -> Callable[[torch.Tensor], tuple | None]:
    """Latents of a chunk [1, C, T, H, W] -> its last frame as ProgressBar's preview, or None where previews are off."""
    if vae:

        def preview(chunk: torch.Tensor) -> tuple:
            picture = Image.fromarray(to_uint8(vae.decode(denormalise(chunk[:, :, -1:])))[0])
            return ("JPEG", picture.resize((picture.width * 4, picture.height * 4), Image.NEAREST), PREVIEW_SIDE)

        return preview
    previewer = latent_preview.get_previewer(torch.device("cpu"), comfy.latent_formats.Wan21())
    if previewer is None:
        return lambda chunk: None
    return lambda chunk: previewer.decode_latent_to_preview_image("JPEG", chunk[:, :, -1:])


def sampler_for(
    model, card: StudentCard, memory: Memory, attention: str = "sdpa", layout: str = "at once", commit_attends="all"
) -> Callable[[torch.Tensor], CausalSampler]:
    """Makes room for the student; then text embeddings -> a sampler under them."""
    device = model.load_device
    network = Network(
        wan_network(model), device, compute_dtype(model), run=runner_of(model),
        on_pass=mm.throw_exception_if_processing_interrupted,
    )  # fmt: skip
    options = SamplerOptions(
        attention=attention_of(model, attention), commit_attends=commit_attends, kv_placement=layout
    )
    warn_of_ignored(model)
    needed = working_bytes(network, memory, layout)
    if needed > (total := mm.get_total_memory(device)):
        others = {name: working_bytes(network, memory, name) / 1e9 for name in KV_PLACEMENTS}
        log.warning(
            "memory: its keys and values and one pass take %.1f GB beside the weights, the device has %.1f; by the"
            " sampler's layout: %s", needed / 1e9, total / 1e9,
            ", ".join(f"{name} {size:.1f} GB" for name, size in others.items()),
        )  # fmt: skip
    if layout != "from RAM":
        needed -= memory.num_bytes_on(device)
    mm.load_models_gpu([model], memory_required=needed)
    student = student_of(model)
    return lambda text: make_sampler(network, card, text, options, student)


class ContextForcingSampler(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="ContextForcingSampler",
            display_name="Context Forcing Sampler",
            category=CATEGORY,
            description="Continues the video by one segment under one prompt. Chain several: each takes the memory of"
            " the one before. Splitting a segment in two changes nothing, as long as prompt and seed stay and the second"
            " half keeps.",
            search_aliases=["rollout", "long video", "causal", "self forcing", "chain"],
            inputs=[
                io.Model.Input("model", tooltip="The student."),
                io.Conditioning.Input("positive", tooltip="The prompt of this segment."),
                MemoryType.Input("memory", tooltip="An empty memory, or the end of the segment before."),
                io.Float.Input(
                    "seconds", default=3.0, min=0.05, max=3600.0, step=0.05,
                    tooltip="Length of this segment, rounded up to whole chunks (0.75 s at 16 frames per second).",
                ),
                io.Int.Input(
                    "seed", default=0, min=0, max=2**63 - 1, control_after_generate=io.ControlAfterGenerate.fixed,
                    tooltip="Noise is a function of the seed and the frame's place in the whole video: keep one seed"
                    " through the chain.",
                ),
                io.Combo.Input(
                    "attention", options=list(ATTENTIONS), default="sdpa", optional=True, advanced=True,
                    tooltip="sdpa: PyTorch's exact attention. comfyui: what ComfyUI was started with (sage, flash,"
                    " xformers), or what another node put on the MODEL; quantised ones drift in long videos.",
                ),
                io.Combo.Input(
                    "commit_attends", options=list(COMMIT_ATTENDS), default="all", optional=True, advanced=True,
                    tooltip="What a finished chunk sees of the memory while it is written into it.",
                ),
                io.Combo.Input(
                    "change", options=list(CHANGES), default="keep", optional=True,
                    tooltip="How this prompt takes over from the one before. keep: only what it says is new; the"
                    " remembered frames stay as they were written. recache: the remembered frames are read again under"
                    " the new prompt. flush: all but the video's first frames and the last chunk is forgotten. cut: a"
                    " new scene, only the video's first frames stay. cut_new_sink: a new scene that remembers nothing."
                    " recache and flush do nothing where the prompt is the same.",
                ),
                io.Int.Input(
                    "blend", default=0, min=0, max=1000, optional=True,
                    tooltip="Chunks (0.75 s at 16 frames per second) over which the old prompt fades into this one, at"
                    " most all but the segment's last; 0: at once.",
                ),
                io.Combo.Input(
                    "keep_in", options=list(PLACES), default="RAM", optional=True, advanced=True,
                    tooltip="Where the memory rests until the next node. RAM: anywhere, always right. GPU: spares"
                    " copying, takes video memory. compact: without keys and values, the least; the next sampler makes"
                    " them anew from the frames, which is close but not the same to the bit.",
                ),
                io.Boolean.Input(
                    "autosave", default=False, optional=True, advanced=True,
                    tooltip="Also write the memory to output/context_forcing when the segment is done, or was"
                    " interrupted: Load Memory goes on from there, even after ComfyUI was closed.",
                ),
                io.Combo.Input(
                    "layout", options=list(KV_PLACEMENTS), default="at once", optional=True, advanced=True,
                    tooltip="How the memory is laid out while this sampler runs; the video is the same. at once:"
                    " fastest, takes twice the memory's size in video memory. by layer: takes its size once, somewhat"
                    " slower. from RAM: the memory stays in RAM and is copied over layer by layer in every pass; slow,"
                    " for videos or models that do not fit.",
                ),
            ],
            outputs=[
                MemoryType.Output("memory", tooltip="The video so far and what it remembers."),
                io.Latent.Output("latent", tooltip="This segment alone, for other nodes."),
            ],
        )  # fmt: skip

    @classmethod
    def execute(
        cls, model, positive, memory, seconds, seed, attention="sdpa", commit_attends="all", change="keep", blend=0,
        keep_in="RAM", autosave=False, layout="at once",
    ) -> io.NodeOutput:  # fmt: skip
        card, text, before = card_of(model), text_of(positive), memory.memory
        if keep_in == "compact":
            before.check_supports("compact")
        chunk = before.config.chunk
        num_chunks = chunks_for(seconds, card.fps, chunk)
        made = latent_seconds(num_chunks * chunk, card.fps)
        if abs(made - seconds) > 1e-6:
            log.info("segment of %g s rounded up to %g s: whole chunks", seconds, made)

        sampler_of = sampler_for(model, card, before, attention, layout, commit_attends)
        progress, preview = comfy.utils.ProgressBar(num_chunks), previewer_of(backbone_of(card.base).preview_vae)
        chunks = generate_segment(
            sampler_of, before, text, prompt=positive[0][1].get(WORDS, ""), seed=seed, num_chunks=num_chunks,
            sigmas=card.sigmas, change=change, blend=blend,
        )  # fmt: skip
        with autosaved(autosave) as kept:
            for done, after in enumerate(chunks, 1):
                kept.memory = after
                progress.update_absolute(done, num_chunks, preview(after.latent_chunks[-1]))
        latents = torch.cat(after.latent_chunks[-num_chunks:], dim=2)
        samples = model.model.process_latent_out(latents).to(mm.intermediate_device())
        after = at_rest(after, keep_in, before)
        return io.NodeOutput(MemoryHandle.of(after, before), {"samples": samples})
