"""The `context-forcing` command."""

import contextlib
import dataclasses
import logging
import math
import sys
import time
from pathlib import Path
from typing import Annotated, Optional

try:
    import typer
    from rich.console import Console
    from rich.logging import RichHandler
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn
except ImportError as error:
    raise SystemExit(
        f"context-forcing: {error.name} is not installed; pip install 'context-forcing[headless]'"
    ) from None

from .convert import Card, Loras, Settings, Weights, convert, student_source

console = Console(stderr=True)
app = typer.Typer(
    help="Long videos that stay consistent: prompts chained over one Slow-Fast memory.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.command()(convert)


Vae = Annotated[
    str | None,
    typer.Option(help="A Wan student's VAE: a file, a diffusers folder, or a name in --models-dir, else found there."),
]
ModelsDir = Annotated[
    Path | None,
    typer.Option(help="ComfyUI's folder `models`, where files are looked up. Default: $COMFYUI_PATH/models, if set."),
]


@app.callback()
def _root() -> None:
    logging.basicConfig(
        level=logging.INFO,
        format="%(message)s",
        handlers=[RichHandler(console=console, show_time=False, show_path=False)],
    )


@app.command()
def generate(
    context: typer.Context,
    story: Annotated[
        Path,
        typer.Argument(
            help="YAML: segments with `prompt` and `seconds`; size, fps, seed. Or a storyboard, .txt: a time and a"
            " prompt a line."
        ),
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="The video to write, .mp4.")],
    student: Annotated[str, typer.Option(help="`demo`, or a student file, or its name in --models-dir.")] = "demo",
    vae: Vae = None,
    text_encoder: Annotated[str | None, typer.Option(help="A Wan student's UMT5-XXL, likewise.")] = None,
    models_dir: ModelsDir = None,
    which: Weights = "auto",
    taken_as: Card = "auto",
    replaced: Settings = None,
    lora: Loras = None,
    seed: Annotated[int | None, typer.Option(min=0, max=2**63 - 1, help="Replaces the story's seed.")] = None,
    memory: Annotated[
        str | None,
        typer.Option(
            help="A memory by name: slow-fast, context-forcing, longlive, infinity-rope. Default: the student's."
        ),
    ] = None,
    policy: Annotated[
        str | None,
        typer.Option(help="What slow memory keeps: novel, clean, fifo or uniform. Default: the student's."),
    ] = None,
    slow: Annotated[int | None, typer.Option(help="Slow slots, in latent frames; 0 is no slow memory.")] = None,
    threshold: Annotated[
        float | None, typer.Option(help="Frames less similar than this are new (policies novel and clean).")
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cuda or cpu.")] = "auto",
    dtype: Annotated[str, typer.Option(help="auto, bf16 or fp32; auto is bf16 on CUDA, fp32 on the CPU.")] = "auto",
    offload: Annotated[
        bool, typer.Option("--offload", help="Keep the student in CPU memory: for one larger than VRAM.")
    ] = False,
    memory_in: Annotated[Path | None, typer.Option(help="Continue this memory; the video starts at its start.")] = None,
    memory_out: Annotated[Path | None, typer.Option(help="Save the memory at the end.")] = None,
    compact: Annotated[
        bool,
        typer.Option("--compact", help="Save it without keys and values: small, and close to exact when continued."),
    ] = False,
    start: Annotated[
        Path | None,
        typer.Option(
            help="A picture or video that the video begins with; frames that do not fill 1 + 4k are left out."
        ),
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with the video that was stopped or killed, to the identical file.")
    ] = False,
    report: Annotated[Path | None, typer.Option(help="Draw what is remembered at the end, .png.")] = None,
    scale: Annotated[
        int | None,
        typer.Option(min=1, max=64, help="Nearest-neighbour enlargement. Default: shorter side at least 360 pixels."),
    ] = None,
) -> None:
    """Make a video from a story."""
    from ..memory.config import named_memory
    from ..memory.snapshot import fingerprint_memory, load_memory, save_memory
    from ..model.checkpoints.locate import locate_student
    from ..model.codecs.backbone import backbone_of
    from ..model.device import pick_device
    from ..video.frames import thumbnails
    from ..video.journal import Journal, journal_path
    from ..video.mp4 import default_scale, hold_output, write_video
    from ..video.pipeline import Pipeline
    from ..video.report import draw_report, summary
    from ..video.storyboard import read_story

    opened = student_source(locate_student(student, models_dir), which, taken_as, replaced, lora).open()
    card = opened.card
    told = read_story(story, card.fps, card.memory.chunk)
    if seed is not None:
        told = told.with_seed(seed)
    context.with_resource(hold_output(output))
    for option, path in (("--memory-out", memory_out), ("--report", report)):
        if path is not None and not path.absolute().parent.is_dir():
            raise ValueError(f"{option}: the folder {path.parent} does not exist")
        if path is not None and path.is_dir():
            raise ValueError(f"{option}: {path} is a folder; give a file name")
    if report is not None and report.suffix.lower() != ".png":
        raise ValueError(f"--report: {report} must end in .png")
    if compact and memory_out is None:
        raise ValueError("--compact: says how --memory-out is written, and there is none")
    if memory_out is not None and memory_in is not None and memory_out.resolve() == memory_in.resolve():
        raise ValueError(
            f"--memory-out: {memory_out} is --memory-in; give another file, so that --resume still has both"
        )
    where = pick_device(device, dtype)
    prompts = [scene.prompt for scene in told.segments]
    codecs = backbone_of(card.base).load_codecs(
        *where, prompts, text_encoder=text_encoder, vae=vae, models_dir=models_dir
    )
    pipeline = Pipeline.load(opened, *where, codecs, offload)
    named = {} if memory is None else dataclasses.asdict(named_memory(memory, pipeline.card.memory))
    settings = {"policy": policy, "slow": slow, "slow_similarity_threshold": threshold}
    settings = named | {name: value for name, value in settings.items() if value is not None}
    if memory_in is not None:
        final = load_memory(memory_in, pipeline.fingerprint)
        told.check_continues(final, settings)
    else:
        final = pipeline.empty_memory(told.size, **settings)
    told.check_fits(final, compact)
    fps, chunk = told.fps or pipeline.card.fps, final.config.chunk
    if start is not None:
        final = final.with_start_latents(pipeline.encode_file(start, final, fps))
    for line in told.rounded(fps, chunk):
        console.print(_escape(line), highlight=False)
    height, width = (side * 8 for side in final.latent_size[1:])
    asked = {**pipeline.names, "loras": lora or [], "story": dataclasses.asdict(told), "card": dataclasses.asdict(card)}
    asked["memory"], num_chunks = fingerprint_memory(final), told.num_chunks(fps, chunk)
    journal = Journal(journal_path(output), asked, resume, num_chunks=num_chunks, shape=final.chunk_shape)
    began = time.monotonic()

    with _progress() as progress, contextlib.ExitStack() as kept:
        # Also after an interrupt or an error: what is finished is kept.
        says = f"{_escape(str(output))}: not finished; --resume goes on"
        kept.push(lambda kind, *_: kind and journal.begun and console.print(says, highlight=False))
        if memory_out is not None:
            kept.callback(
                lambda: final.latent_chunks and save_memory(memory_out, final.compact() if compact else final)
            )
        task = progress.add_task("generate", total=num_chunks, says="")

        def latents():
            nonlocal final
            yield from final.latent_chunks
            for done, after in enumerate(pipeline.generate(told, final, made=journal.made), 1):
                before, final = len(final.latent_chunks), after
                journal.keep(done - 1, final.latent_chunks[-1])
                rate = max(0, done - len(journal.made)) * chunk * 4 / max(1e-6, time.monotonic() - began)
                slots = final.slots
                progress.update(
                    task,
                    completed=done,
                    says=f"{rate:.1f} frames/s  remembers {len(slots.sink)} sink {len(slots.slow)} slow"
                    f" {len(slots.fast)} fast",
                )
                yield from final.latent_chunks[before:]

        count = write_video(output, pipeline.decode(latents()), fps=fps, scale=scale or default_scale(width, height))
    journal.close()
    seconds = time.monotonic() - began
    if report is not None:
        draw_report(final, thumbnails(final, pipeline.decode), fps).save(report)
    console.print(summary(final, fps), highlight=False)
    console.print(
        f"{_escape(str(output))}: {count} frames, {count / fps:.2f} s, made in {seconds:.1f} s", highlight=False
    )


@app.command()
def report(
    memory: Annotated[Path, typer.Argument(help="What `generate --memory-out` or the node Save Memory wrote.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="The picture to write, .png.")],
    attention: Annotated[
        bool,
        typer.Option("--attention", help="Also how much the next chunk would look at sink, slow, fast and itself."),
    ] = False,
    student: Annotated[
        str, typer.Option(help="`demo`, or the student file that made it; only of its own are frames drawn.")
    ] = "demo",
    vae: Vae = None,
    models_dir: ModelsDir = None,
    fps: Annotated[float | None, typer.Option(help="Frames per second. Default: the student's.")] = None,
    device: Annotated[str, typer.Option(help="auto, cuda or cpu.")] = "auto",
    dtype: Annotated[str, typer.Option(help="auto, bf16 or fp32.")] = "auto",
) -> None:
    """Draw what a saved memory remembers, since when, and what was let go and why."""
    from ..memory.snapshot import load_memory
    from ..model.attention_mass import attention_mass
    from ..model.checkpoints.locate import locate_student
    from ..model.checkpoints.student import StudentSource
    from ..model.codecs.backbone import backbone_of
    from ..model.device import pick_device
    from ..video.frames import thumbnails
    from ..video.pipeline import Pipeline
    from ..video.report import draw_report, summary

    if output.suffix.lower() != ".png":
        raise ValueError(f"--output: {output} must end in .png")
    if output.is_dir() or not output.absolute().parent.is_dir():
        raise ValueError(f"--output: {output} is a folder or lies in none; give a file name in a folder that exists")
    if fps is not None and not 0 < fps < math.inf:
        raise ValueError(f"--fps: {fps:g} must be above 0")
    held = load_memory(memory)
    opened, where = StudentSource(locate_student(student, models_dir)).open(), pick_device(device, dtype)
    codecs = backbone_of(opened.card.base).load_codecs(*where, vae=vae, models_dir=models_dir)
    pipeline = Pipeline.load(opened, *where, codecs)
    own = held.student in ("", pipeline.fingerprint)
    if not own:
        says = f"{_escape(str(memory))}: made by another student; without its --student no frames are drawn"
        console.print(says, highlight=False, soft_wrap=True)
    mass = attention_mass(pipeline.sampler, held, pipeline.card.sigmas) if attention else None
    fps = fps or pipeline.card.fps
    draw_report(held, thumbnails(held, pipeline.decode) if own else None, fps, mass).save(output)
    console.print(summary(held, fps, mass), highlight=False, soft_wrap=True)


def _progress() -> Progress:
    return Progress(
        TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn(),
        TextColumn("{task.fields[says]}"), console=console,
    )  # fmt: skip


@app.command()
def train(
    stage: Annotated[str, typer.Argument(help="vae, pretrain, teacher, local, contextual, in this order; export.")],
    overrides: Annotated[list[str] | None, typer.Argument(help="key=value, for example steps=100.")] = None,
    config: Annotated[
        str, typer.Option(help="demo, smoke, wan2.1-1.3b (from teacher on), or a YAML file of settings.")
    ] = "demo",
    resume: Annotated[bool, typer.Option("--resume", help="Continue from the run's last checkpoint.")] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the settings and what a process will need; do nothing.")
    ] = False,
) -> None:
    """Train: the demo codec (`vae`), a causal student (`pretrain`), a `teacher` that continues from memory, and the
    student by distribution matching on short (`local`) and long (`contextual`) rollouts of its own.

    Many processes: `torchrun --nproc-per-node 8 -m context_forcing.train STAGE ...`.
    """
    from ..train import plan_stage, run_stage

    if dry_run:
        for part in plan_stage(stage, config, overrides or []):
            # Settings hold brackets of their own; the table's are rich's.
            Console().print(part, highlight=False, markup=not isinstance(part, str))
        return
    console.print(f"written to {run_stage(stage, config, overrides or [], resume)}", highlight=False)


@app.command()
def encode(
    source: Annotated[
        Path,
        typer.Argument(
            help="A folder of videos, each with a .txt caption of the same name beside it; a .csv or .tsv with columns"
            " path, caption and, if wanted, start, end (seconds); or a .txt with a prompt a line."
        ),
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder of the set; goes on with one begun there.")],
    model: Annotated[
        str,
        typer.Option(
            help="`demo`, or a local copy of Wan-AI/Wan2.1-T2V-1.3B-Diffusers (vae, text_encoder, tokenizer)."
        ),
    ] = "demo",
    size: Annotated[
        str | None,
        typer.Option(help="WIDTHxHEIGHT, multiples of 16. Default: 128x64 for the demo, 832x480 for Wan."),
    ] = None,
    fps: Annotated[int, typer.Option(min=1, help="Frames per second that videos are resampled to.")] = 16,
    frames: Annotated[int, typer.Option(min=1, help="Latent frames of a clip; 42 are 165 frames, 10.3 s.")] = 42,
    max_clips: Annotated[int | None, typer.Option(min=1, help="Stop when the set holds so many.")] = None,
    dtype: Annotated[str, typer.Option(help="What is stored: fp16 or bf16.")] = "fp16",
    shard_mb: Annotated[int, typer.Option(min=1, help="Megabytes after which a shard is closed.")] = 256,
    device: Annotated[str, typer.Option(help="auto, cuda or cpu.")] = "auto",
    retry: Annotated[bool, typer.Option("--retry", help="Try videos again that were skipped.")] = False,
) -> None:
    """Turn videos with captions, or prompts, into a set of latents and text embeddings to train on."""
    from ..train.data.encode import EncodeSettings, SetEncoder, parse_size

    settings = EncodeSettings(
        model=model, size=None if size is None else parse_size(size), fps=fps, frames=frames, max_clips=max_clips,
        dtype=dtype, shard_mb=shard_mb, device=device, retry=retry,
    )  # fmt: skip
    run = SetEncoder(source, output, settings)
    with _progress() as progress:
        task = progress.add_task("encode", total=len(run.sources), says="")
        summary = run.run(
            lambda done, so_far: progress.update(
                task, completed=done, says=f"{so_far.clips} clips  {len(so_far.skipped)} skipped"
            )
        )
    for name, reason in list(summary.skipped.items())[:SKIPPED_SHOWN]:
        console.print(f"skipped {_escape(name)}: {_escape(reason)}", highlight=False, soft_wrap=True)
    console.print(
        f"{_escape(str(output))}: {summary.clips} clips ({summary.new_clips} new) of {summary.through} sources,"
        f" {len(summary.skipped)} skipped; the manifest lists all",
        highlight=False, soft_wrap=True,
    )  # fmt: skip


SKIPPED_SHOWN = 20


@app.command()
def evaluate(
    output: Annotated[
        Path, typer.Option("--output", "-o", help="Folder for the JSON, the plots and the filmstrips; goes on there.")
    ],
    student: Annotated[str, typer.Option(help="`demo`, or a student file.")] = "demo",
    compare: Annotated[
        list[str] | None,
        typer.Option(help="Another student on the same scenes and noise, FILE or FILE=policy,policy. Repeatable."),
    ] = None,
    policies: Annotated[
        str, typer.Option(help="Comma-separated: novel, clean, fifo, uniform, none (no slow memory).")
    ] = "novel,clean,none",
    rollouts: Annotated[int, typer.Option(min=2, help="Scenes a seed.")] = 12,
    gaps: Annotated[
        str, typer.Option(help="Chunks spent elsewhere before the camera returns; empty is none.")
    ] = "8,24",
    minutes: Annotated[float, typer.Option(min=0, help="Length of long rollouts, to measure drift; 0 is none.")] = 0,
    long_rollouts: Annotated[int, typer.Option(min=2, help="Long rollouts a seed.")] = 4,
    seed: Annotated[str, typer.Option(help="Seeds of scenes and noise, comma-separated.")] = "0",
    video: Annotated[
        list[Path] | None,
        typer.Option(help="Measure this video instead, by --clip and --dino; none of the above applies. Repeatable."),
    ] = None,
    clip: Annotated[Path | None, typer.Option(help="Folder of a CLIP model in transformers' layout.")] = None,
    dino: Annotated[Path | None, typer.Option(help="Folder of a DINOv2 model in transformers' layout.")] = None,
    every: Annotated[float, typer.Option(help="Seconds between the frames of a video that are looked at.")] = 1.0,
    device: Annotated[str, typer.Option(help="auto, cuda or cpu.")] = "auto",
    dtype: Annotated[str, typer.Option(help="auto, bf16 or fp32.")] = "auto",
) -> None:
    """Measure students on the demo world (recall over gaps, drift), or videos (consistency over time)."""
    if video or clip or dino:
        from ..train.evaluation.consistency import evaluate_videos

        tables = evaluate_videos(video or [], clip, dino, every, device, dtype, output)
    else:
        from ..train.evaluation.evaluate import Plan, evaluate, parse_students, whole_numbers

        plan = Plan(
            students=parse_students(student, compare or [], policies),
            gaps=whole_numbers("gaps", gaps),
            rollouts=rollouts,
            seeds=whole_numbers("seed", seed),
            minutes=minutes,
            long_rollouts=long_rollouts,
        )
        tables = evaluate(plan, device, dtype, output)
    for table in tables:
        Console(width=max(240, console.width)).print(table, highlight=False)


@app.command()
def doctor() -> None:
    """Say what this machine has, and what is missing."""
    from .doctor import examine

    findings = examine()
    for finding in findings:
        mark = "[green]ok[/]     " if finding.ok else "[red]missing[/]" if finding.needed else "[yellow]absent[/] "
        console.print(f"{mark} {finding.what}: {finding.says}", highlight=False)
    if any(finding.needed and not finding.ok for finding in findings):
        raise typer.Exit(1)


def main() -> None:
    """Run the command; what a user can cause is one line and exit code 2."""
    try:
        app()
    except (ValueError, FloatingPointError) as error:
        console.print(f"[bold red]error:[/] {_escape(str(error))}", highlight=False, soft_wrap=True)
        sys.exit(2 if isinstance(error, ValueError) else 1)


def train_main() -> None:
    """`python -m context_forcing.train STAGE ...`."""
    sys.argv.insert(1, "train")
    main()


def _escape(text: str) -> str:
    from rich.markup import escape

    return escape(text)
