"""`context-forcing report`."""

import math
from pathlib import Path
from typing import Annotated

from rich.console import Console
from rich.table import Table
from rich.text import Text
from typer import Argument, Option

from .console import say
from .options import Decoder, Device, Dtype, ModelsDir, Student, Vae

FILE = "Memory of `generate --memory-out` or of the node Save Memory; or a video of `generate`, .mp4."


def report(
    file: Annotated[Path, Argument(help=FILE)],
    output: Annotated[Path | None, Option("--output", "-o", help="Picture of a memory to write, .png.")] = None,
    attention: Annotated[bool, Option("--attention", help="Also draw what the next chunk attends to.")] = False,
    student: Student = "demo",
    vae: Vae = None,
    decoder: Decoder = None,
    models_dir: ModelsDir = None,
    fps: Annotated[float | None, Option(help="Frames per second. Default: the student's.")] = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
) -> None:
    """Draw what a saved memory remembers, since when, and what it dropped and why; or print what made a video.

    The remembered frames are drawn only with the student that made the memory.
    """
    if file.suffix.lower() == ".mp4":
        if output is not None or attention:
            raise ValueError(f"--output, --attention: {file} is a video, its report is text; leave them out")
        _print_provenance(file)
        return
    from ..memory.files import check_writable
    from ..memory.snapshot import load_memory, read_header
    from ..model.attention_mass import attention_mass
    from ..model.checkpoints.locate import locate_student
    from ..model.checkpoints.student import StudentSource
    from ..model.codecs.backbone import backbone_of
    from ..model.device import pick_device
    from ..video.frames import save_picture, thumbnails
    from ..video.pipeline import Pipeline
    from ..video.report import draw_report, summary

    read_header(file)
    if output is None:
        raise ValueError(f"--output: {file} is drawn as a picture; give -o with a name that ends in .png")
    if output.suffix.lower() != ".png":
        raise ValueError(f"--output: {output} does not end in .png; give a name that does")
    check_writable("--output", output)
    if fps is not None and not 0 < fps < math.inf:
        raise ValueError(f"--fps: {fps:g} is not a number above 0")
    saved = load_memory(file)
    opened, where = StudentSource(locate_student(student, models_dir)).open(), pick_device(device, dtype)
    codecs = backbone_of(opened.card.base).load_codecs(
        *where, vae=vae, decoder=decoder, encodes=False, models_dir=models_dir
    )
    pipeline = Pipeline.load(opened, *where, codecs)
    is_own = saved.student in ("", pipeline.fingerprint)
    if not is_own:
        say(f"{file}: made by another student; no frames are drawn without its --student")
    mass = attention_mass(pipeline.sampler, saved, pipeline.card.sigmas) if attention else None
    fps = fps or pipeline.card.fps
    pictures = thumbnails(saved, pipeline.decode) if is_own else None
    save_picture(output, draw_report(saved, pictures, fps, mass))
    say(summary(saved, fps, mass))


def _print_provenance(video: Path) -> None:
    from ..video.provenance import describe

    table = Table(box=None, show_header=False, pad_edge=False)
    for name, value in describe(video):
        table.add_row(Text(name), Text(value, overflow="fold"))
    Console().print(table)
