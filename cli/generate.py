"""`context-forcing generate`."""

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from typer import Argument, Option

from .console import progress_bar, say
from .options import Card, Decoder, Device, Dtype, Loras, ModelsDir, Settings, Student, TextEncoder, Vae, Weights

if TYPE_CHECKING:
    from ..video.generate import GenerateJob

STORY = """YAML: `segments`, each with `prompt` and `seconds`; optional `size`, `fps` and `seed`. Or a storyboard, .txt:
a time and a prompt per line."""
LIKE = "Make this video of `generate` again: its story, seeds, memory and options. Options given here win."
REFERENCE = "With --like: a picture of the story's references. Repeatable, in the order of the story."
MEMORY = "Memory by name: slow-fast, context-forcing, released, longlive, infinity-rope. Default: the student's."
POLICY = "What slow memory keeps: novel, cover, recall, clean, fifo, uniform, released. Default: the student's."
COMMIT_ATTENDS = """What a finished chunk attends to while it is written to the memory: all, no sink, fast only, itself.
Default: the story's, or else the student's."""
ATTENTION = "sdpa (default), flash, sage or sage3: each needs its package and CUDA, and is tested before use."
KV_PLACEMENT = "Where keys and values are for a chunk: at once (fastest), by layer, from RAM (least video memory)."
KV_DTYPE = """How keys and values of sink and slow frames are stored: auto (as computed), int8 or fp8. Eight bits are
half the memory of bf16, and another video."""
COMPACT = "Write --memory-out without keys and values: small; its continuation is close to exact."
SCALE = "Nearest-neighbour enlargement. Default: the shorter side gets 360 pixels or more."


def generate(
    output: Annotated[Path, Option("--output", "-o", help="Video to write, .mp4.")],
    story: Annotated[Path | None, Argument(help=STORY)] = None,
    like: Annotated[Path | None, Option(help=LIKE)] = None,
    reference: Annotated[list[Path] | None, Option(help=REFERENCE)] = None,
    student: Student = "demo",
    vae: Vae = None,
    decoder: Decoder = None,
    text_encoder: TextEncoder = None,
    models_dir: ModelsDir = None,
    weights: Weights = "auto",
    card: Card = "auto",
    settings: Settings = None,
    lora: Loras = None,
    seed: Annotated[int | None, Option(min=0, max=2**63 - 1, help="Replaces all seeds of the story.")] = None,
    memory: Annotated[str | None, Option(help=MEMORY)] = None,
    policy: Annotated[str | None, Option(help=POLICY)] = None,
    slow: Annotated[int | None, Option(help="Latent frames in slow memory; 0: no slow memory.")] = None,
    threshold: Annotated[float | None, Option(help="Frames less similar than this are kept in slow memory.")] = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    offload: Annotated[bool, Option("--offload", help="Keep the student in CPU memory: larger than VRAM.")] = False,
    attention: Annotated[str | None, Option(help=ATTENTION)] = None,
    commit_attends: Annotated[str | None, Option(help=COMMIT_ATTENDS)] = None,
    kv_placement: Annotated[str, Option(help=KV_PLACEMENT)] = "at once",
    kv_dtype: Annotated[str | None, Option(help=KV_DTYPE)] = None,
    memory_in: Annotated[Path | None, Option(help="Memory to continue; its video is the start of this one.")] = None,
    memory_out: Annotated[Path | None, Option(help="File for the memory at the end.")] = None,
    compact: Annotated[bool, Option("--compact", help=COMPACT)] = False,
    start: Annotated[Path | None, Option(help="Picture or video to begin with; 1 + 4k frames are used.")] = None,
    resume: Annotated[bool, Option("--resume", help="Continue an interrupted video, to the identical file.")] = False,
    report: Annotated[Path | None, Option(help="Picture of the memory at the end, .png.")] = None,
    scale: Annotated[int | None, Option(help=SCALE)] = None,
) -> None:
    """Generate a video from a story, or one again from what its file says (--like)."""
    from ..model.checkpoints.locate import locate_student
    from ..model.checkpoints.student import StudentSource
    from ..video.generate import GenerateRequest, open_job

    fields = {"policy": policy, "slow": slow, "slow_similarity_threshold": threshold}
    request = GenerateRequest(
        story=story,
        like=like,
        output=output,
        student=StudentSource.parse(locate_student(student, models_dir), weights, card, settings or (), lora or ()),
        loras=tuple(lora or ()),
        text_encoder=text_encoder,
        vae=vae,
        decoder=decoder,
        models_dir=models_dir,
        seed=seed,
        memory=memory,
        settings={name: value for name, value in fields.items() if value is not None},
        device=device,
        dtype=dtype,
        offload=offload,
        attention=attention,
        commit_attends=commit_attends,
        kv_placement=kv_placement,
        kv_dtype=kv_dtype,
        memory_in=memory_in,
        memory_out=memory_out,
        compact=compact,
        start=start,
        references=tuple(reference or ()),
        resume=resume,
        report=report,
        scale=scale,
    )
    with open_job(request) as job:
        _run(job)


def _run(job: "GenerateJob") -> None:
    """Make the video, with a bar, and say what it is."""
    output = job.request.output
    if job.journal is None:  # `torchrun` started this process to help the first one.
        job.run()
        return
    began = time.monotonic()
    try:
        with progress_bar() as bar:
            task = bar.add_task("generate", total=job.story.num_chunks, note="")
            num_frames = job.run(lambda finished, note: bar.update(task, completed=finished, note=note))
    finally:
        if job.has_chunks and not job.is_whole:
            say(f"{output}: not finished; --resume continues it")
    seconds = time.monotonic() - began
    say(job.summary)
    say(f"{output}: {num_frames} frames, {num_frames / job.story.fps:.2f} s, generated in {seconds:.1f} s")
