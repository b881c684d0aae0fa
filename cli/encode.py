"""`context-forcing encode`."""

from pathlib import Path
from typing import Annotated

from typer import Argument, Option

from .console import on_interrupt, progress_bar, say
from .options import Device
from .workers import Count, Ray, Retries, open_engine

SOURCE = """A folder of videos, each with a caption in a .txt beside it; a .csv or .tsv with columns path, caption
and optionally start and end in seconds; or a .txt with a prompt per line."""
MODEL = "`demo`, or a local copy of Wan-AI/Wan2.1-T2V-1.3B-Diffusers (vae, text_encoder, tokenizer)."
SIZE = "WIDTHxHEIGHT, multiples of 16. Default: 128x64 for the demo, 832x480 for Wan."
NEGATIVE_PROMPT = """Prompt of what a video should not be; its text is stored for training. Default: that published with
Wan 2.1; the demo has none."""
MAX_SKIPPED = 20
"""Skipped sources that are printed."""


def encode(
    source: Annotated[Path, Argument(help=SOURCE)],
    output: Annotated[Path, Option("--output", "-o", help="Folder of the set; a set begun there is continued.")],
    model: Annotated[str, Option(help=MODEL)] = "demo",
    size: Annotated[str | None, Option(help=SIZE)] = None,
    fps: Annotated[int, Option(min=1, help="Frames per second that videos are resampled to.")] = 16,
    frames: Annotated[int, Option(min=1, help="Latent frames of a clip; 42 are 165 frames, 10.3 s.")] = 42,
    max_clips: Annotated[int | None, Option(min=1, help="Stop when the set has this many clips.")] = None,
    dtype: Annotated[str, Option(help="Dtype of the stored latents: fp16 or bf16.")] = "fp16",
    shard_mb: Annotated[int, Option(min=1, help="Megabytes of a shard.")] = 256,
    device: Device = "auto",
    retry: Annotated[bool, Option("--retry", help="Try skipped videos again.")] = False,
    negative_prompt: Annotated[str | None, Option(help=NEGATIVE_PROMPT)] = None,
    workers: Count = None,
    ray: Ray = None,
    retries: Retries = 2,
) -> None:
    """Encode videos with captions, or prompts, into a training set of latents and text embeddings."""
    from ..memory.files import hold_folder
    from ..train.data.encode import EncodeSettings, SetEncoder, parse_size
    from ..train.data.encode_jobs import SetEncoderOnWorkers

    settings = EncodeSettings(
        model=model,
        size=None if size is None else parse_size(size),
        fps=fps,
        frames=frames,
        max_clips=max_clips,
        dtype=dtype,
        shard_mb=shard_mb,
        device=device,
        retry=retry,
        negative_prompt=negative_prompt,
    )
    kept = lambda: f"{output}: not finished; finished clips are kept, the same command continues"
    with on_interrupt(kept), hold_folder("output", output), open_engine(workers, ray, retries, device) as engine:
        if engine is None:
            encoder = SetEncoder(source, output, settings)
            with progress_bar() as bar:
                task = bar.add_task("encode", total=len(encoder.sources), note="")
                note = lambda: f"{encoder.num_clips} clips  {len(encoder.skipped)} skipped"
                encoder.run(lambda num_sources: bar.update(task, completed=num_sources, note=note()))
        else:
            encoder = SetEncoderOnWorkers(source, output, settings, engine)
            encoder.run()
    for name, reason in list(encoder.skipped.items())[:MAX_SKIPPED]:
        say(f"skipped {name}: {reason}")
    say(
        f"{output}: {encoder.num_clips} clips ({encoder.new_clips} new) of {len(encoder.sources)} sources,"
        f" {len(encoder.skipped)} skipped; the manifest lists all"
    )
    if not encoder.num_clips:
        raise ValueError(f"source: {source} gives no clip; the reasons are above")
