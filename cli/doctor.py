"""What this machine has, and what is missing."""

import importlib.metadata
import importlib.util
import os
import platform
from dataclasses import dataclass
from pathlib import Path

import torch

from ..model.checkpoints.student import DEMO_STUDENT
from ..model.codecs.demo_vae import DEMO_CODEC


@dataclass(frozen=True)
class Finding:
    """One line of the doctor's report."""

    what: str
    ok: bool
    says: str
    needed: bool = True


def comfyui_path() -> Path:
    """Where ComfyUI is looked for: $COMFYUI_PATH, else comfy-cli's default workspace."""
    return Path(os.environ.get("COMFYUI_PATH") or Path.home() / "comfy" / "ComfyUI")


def examine() -> list[Finding]:
    """Look at Python, torch, the device, attention backends, ffmpeg, the built-in weights and ComfyUI."""
    findings = [
        Finding("Python", True, f"{platform.python_version()} on {platform.system()}"),
        Finding("torch", True, torch.__version__),
        _device(),
        Finding("attention sdpa", True, "PyTorch's own, the default"),
    ]
    if importlib.util.find_spec("sageattention"):
        version = importlib.metadata.version("sageattention")
        findings.append(Finding("attention sage", True, f"sageattention {version} is installed; ComfyUI can use it"))
    else:
        findings.append(
            Finding(
                "attention sage", False, "pip install sageattention to let ComfyUI use it; not needed", needed=False
            )
        )
    findings.append(_ffmpeg())
    for name, path in (("demo student", DEMO_STUDENT), ("demo codec", DEMO_CODEC)):
        size = (
            f"{path.stat().st_size / 1e6:.1f} MB" if path.is_file() else f"{path} is not there; reinstall the package"
        )
        findings.append(Finding(name, path.is_file(), size))
    findings += [_wan(), _comfyui()]
    return findings


def _device() -> Finding:
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        return Finding("device", True, f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB, bf16")
    return Finding(
        "device", True, f"CPU with {torch.get_num_threads()} threads, fp32 (no CUDA: fine for the demo student)"
    )


def _ffmpeg() -> Finding:
    try:
        import imageio_ffmpeg

        return Finding("ffmpeg", True, f"{imageio_ffmpeg.get_ffmpeg_version()} ({imageio_ffmpeg.get_ffmpeg_exe()})")
    except (ImportError, RuntimeError) as error:
        return Finding("ffmpeg", False, f"{error}; pip install imageio-ffmpeg")


def _wan() -> Finding:
    """What prompts of Wan students are read with, headless."""
    names = ("sentencepiece", "tokenizers", "ftfy")
    if missing := [name for name in names if importlib.util.find_spec(name) is None]:
        says = f"no {', '.join(missing)}; pip install 'context-forcing[wan]' for prompts of Wan students, headless"
        return Finding("Wan text", False, says, needed=False)
    return Finding("Wan text", True, f"{', '.join(names)}: prompts of Wan students can be read")


def _comfyui() -> Finding:
    path = comfyui_path()
    if not (path / "main.py").is_file():
        return Finding(
            "ComfyUI",
            False,
            f"none at {path}; set COMFYUI_PATH if it is elsewhere (only the nodes need it)",
            needed=False,
        )
    version = "unknown version"
    version_file = path / "comfyui_version.py"
    if version_file.is_file():
        version = version_file.read_text(encoding="utf-8").partition('__version__ = "')[2].partition('"')[0]
    return Finding("ComfyUI", True, f"{version} at {path}")
