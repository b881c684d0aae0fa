"""`context-forcing doctor`."""

import importlib.metadata
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
    ok: bool
    text: str
    required: bool = True


def doctor() -> None:
    """Print what this machine has, and what is missing."""
    findings = examine()
    for finding in findings:
        mark = "[green]ok[/]     " if finding.ok else "[red]missing[/]" if finding.required else "[yellow]absent[/] "
        console.print(f"{mark} {finding.name}: {escape(finding.text)}", highlight=False)
    if any(finding.required and not finding.ok for finding in findings):
        raise typer.Exit(1)


def comfyui_path() -> Path:
    """$COMFYUI_PATH, or the default workspace of comfy-cli."""
    return Path(os.environ.get("COMFYUI_PATH") or Path.home() / "comfy" / "ComfyUI")


def examine() -> list[Finding]:
    """Look for Python, torch, a device, attention backends, ffmpeg, the built-in weights and ComfyUI."""
    import torch

    from ..model.checkpoints.student import DEMO_STUDENT
    from ..model.codecs.demo_vae import DEMO_CODEC

    device = f"CPU with {torch.get_num_threads()} threads, fp32 (no CUDA: enough for the demo student)"
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        device = f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB, bf16"
    return [
        Finding("Python", True, f"{platform.python_version()} on {platform.system()}"),
        Finding("torch", True, torch.__version__),
        Finding("device", True, device),
        Finding("attention sdpa", True, "PyTorch's own, the default"),
        _sage(),
        _ffmpeg(),
        _file("demo student", DEMO_STUDENT),
        _file("demo codec", DEMO_CODEC),
        _wan(),
        _comfyui(),
    ]


def _sage() -> Finding:
    if importlib.util.find_spec("sageattention"):
        version = importlib.metadata.version("sageattention")
        return Finding("attention sage", True, f"sageattention {version}")
    return Finding("attention sage", False, "optional; pip install sageattention to use it", required=False)


def _ffmpeg() -> Finding:
    try:
        import imageio_ffmpeg

        return Finding("ffmpeg", True, f"{imageio_ffmpeg.get_ffmpeg_version()} ({imageio_ffmpeg.get_ffmpeg_exe()})")
    except (ImportError, RuntimeError) as error:
        return Finding("ffmpeg", False, f"{error}; pip install imageio-ffmpeg")


def _file(name: str, path: Path) -> Finding:
    if path.is_file():
        return Finding(name, True, f"{path.stat().st_size / 1e6:.1f} MB")
    return Finding(name, False, f"{path} does not exist; reinstall the package")


def _wan() -> Finding:
    """The tokenizers for prompts of Wan students without ComfyUI."""
    names = ("sentencepiece", "tokenizers", "ftfy")
    if missing := [name for name in names if importlib.util.find_spec(name) is None]:
        text = (
            f"no {', '.join(missing)}; pip install 'context-forcing[wan]' for prompts of Wan students without ComfyUI"
        )
        return Finding("Wan text", False, text, required=False)
    return Finding("Wan text", True, f"{', '.join(names)}: prompts of Wan students can be encoded")


def _comfyui() -> Finding:
    path = comfyui_path()
    if not (path / "main.py").is_file():
        text = f"none at {path}; set COMFYUI_PATH if it is elsewhere (only the nodes need it)"
        return Finding("ComfyUI", False, text, required=False)
    version = "unknown version"
    version_file = path / "comfyui_version.py"
    if version_file.is_file():
        version = version_file.read_text(encoding="utf-8").partition('__version__ = "')[2].partition('"')[0]
    return Finding("ComfyUI", True, f"{version} at {path}")
