"""`context-forcing doctor`."""

import importlib.util
import os
import platform
from dataclasses import dataclass
from pathlib import Path

import typer
from rich.markup import escape

from .console import console


@dataclass(frozen=True)
class Finding:
    """One line of the doctor's output."""

    name: str
    text: str
    ok: bool = True
    required: bool = True


def doctor() -> None:
    """Print what this machine has, and what is missing."""
    findings = examine()
    for finding in findings:
        mark = "[green]ok[/]     " if finding.ok else "[red]missing[/]" if finding.required else "[yellow]absent[/] "
        console.print(f"{mark} {finding.name}: {escape(finding.text)}", highlight=False)
    if any(finding.required and not finding.ok for finding in findings):
        raise typer.Exit(1)


def examine() -> list[Finding]:
    """Look for Python, torch, a device, attention backends, ffmpeg, the built-in weights and ComfyUI."""
    import torch

    from ..model.attention import BACKENDS
    from ..model.checkpoints.student import DEMO_STUDENT
    from ..model.codecs.demo_vae import DEMO_CODEC

    device = f"CPU (threads: {torch.get_num_threads()}), fp32 (no CUDA: enough for the demo student)"
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        device = f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB, bf16"
    return [
        Finding("Python", f"{platform.python_version()} on {platform.system()}"),
        Finding("torch", torch.__version__),
        Finding("device", device),
        Finding("attention sdpa", "PyTorch's own, the default"),
        *(_optional(f"attention {name}", [each.package], each.install) for name, each in BACKENDS.items()),
        _ffmpeg(),
        _file("demo student", DEMO_STUDENT),
        _file("demo codec", DEMO_CODEC),
        _optional(
            "Wan text",
            ["sentencepiece", "tokenizers", "ftfy"],
            "pip install 'context-forcing[wan]' for prompts of Wan students without ComfyUI",
        ),
        _comfyui(),
    ]


def _optional(name: str, packages: list[str], remedy: str) -> Finding:
    if missing := [package for package in packages if importlib.util.find_spec(package) is None]:
        return Finding(name, f"no {', '.join(missing)}; {remedy}", ok=False, required=False)
    from ..video.provenance import version_of

    return Finding(name, ", ".join(f"{package} {version_of(package)}" for package in packages))


def _ffmpeg() -> Finding:
    from ..video.reading import ffmpeg_program, ffmpeg_version

    try:
        return Finding("ffmpeg", f"{ffmpeg_version()} ({ffmpeg_program()})")
    except ValueError as error:
        return Finding("ffmpeg", str(error).removeprefix("ffmpeg: "), ok=False)


def _file(name: str, path: Path) -> Finding:
    if path.is_file():
        return Finding(name, f"{path.stat().st_size / 1e6:.1f} MB")
    return Finding(name, f"{path} does not exist; reinstall the package", ok=False)


def _comfyui() -> Finding:
    """ComfyUI at $COMFYUI_PATH, or in the default workspace of comfy-cli."""
    path = Path(os.environ.get("COMFYUI_PATH") or Path.home() / "comfy" / "ComfyUI")
    if not (path / "main.py").is_file():
        text = f"none at {path}; set COMFYUI_PATH if it is elsewhere (only the nodes need it)"
        return Finding("ComfyUI", text, ok=False, required=False)
    file = path / "comfyui_version.py"
    text = file.read_text(encoding="utf-8") if file.is_file() else ""
    number = text.partition('__version__ = "')[2].partition('"')[0] or "unknown version"
    return Finding("ComfyUI", f"{number} at {path}")
