"""Files of a student, a text encoder and a VAE: by path, or in ComfyUI's models folder."""

import os
from collections.abc import Callable, Mapping
from pathlib import Path

from torch import Tensor

from .containers import PICKLES, SAFETENSORS, open_container
from .published import KNOWN

BUILT_IN = "demo"
"""The name of the built-in student."""
FOLDERS = {
    "student": ("diffusion_models", "unet"),
    "text-encoder": ("text_encoders", "clip"),
    "vae": ("vae",),
    "decoder": ("vae_approx", "vae"),
}
"""Folders of ComfyUI's models folder that hold a part."""


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a file or folder, memory-mapped. Raises ValueError, one line, if there is anything else."""
    tree = open_container(path).tree
    if not all(isinstance(value, Tensor) for value in tree.values()):
        raise ValueError(f"{path}: holds other values than tensors; give a file of weights")
    return dict(tree)


def subfolder(path: Path, name: str) -> Path:
    """The folder of a part within a diffusers folder, or the path itself."""
    return path / name if (path / name).is_dir() else path


def default_models_dir(path: Path | None) -> Path | None:
    """ComfyUI's models folder: `path`, else that of $COMFYUI_PATH if it is set. Raises ValueError."""
    if path is None and os.environ.get("COMFYUI_PATH"):
        path = Path(os.environ["COMFYUI_PATH"]) / "models"
    if path is not None and not path.is_dir():
        raise ValueError(f"--models-dir: {path} is not a folder; give ComfyUI's folder `models`")
    return path


def locate_student(name: str, models_dir: Path | None) -> Path | None:
    """The student's file; None for the built-in one. Raises ValueError, one line."""
    return None if name == BUILT_IN else locate("student", name, default_models_dir(models_dir))


def locate(kind: str, name: str, models_dir: Path | None) -> Path:
    """A part by path, or by its name in the models folder. Raises ValueError, one line, if there is no such file."""
    paths = [Path(name), *(models_dir / folder / name for folder in FOLDERS[kind] if models_dir)]
    for path in paths:
        if path.exists():
            return path
    known = f"; {KNOWN}" if kind == "student" else ""
    raise ValueError(f"--{kind}: no such file: {', nor '.join(map(str, paths))}{known}")


def find(kind: str, models_dir: Path, why_not: Callable[[Mapping[str, Tensor]], str]) -> Path:
    """The only file in the models folder for which `why_not` is empty. Raises ValueError with the candidates."""
    folders = [models_dir / folder for folder in FOLDERS[kind]]
    files = [file for folder in folders for file in sorted(folder.rglob("*")) if _is_weights(file)]
    fitting = [file for file in files if _fits(file, why_not)]
    if len(fitting) == 1:
        return fitting[0]
    names = ", ".join(file.name for file in fitting or files) or "no file"
    if fitting:
        raise ValueError(f"--{kind}: {len(fitting)} files fit: {names}; give one of them")
    where = " and ".join(map(str, folders))
    raise ValueError(f"--{kind}: none of {len(files)} files in {where} is for Wan 2.1 ({names}); give its path")


def _is_weights(file: Path) -> bool:
    return file.is_file() and file.suffix.lower() in (*SAFETENSORS, *PICKLES)


def _fits(file: Path, why_not: Callable[[Mapping[str, Tensor]], str]) -> bool:
    try:
        return not why_not(read_tensors(file))
    except ValueError:
        return False
