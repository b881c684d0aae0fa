"""Files of a student's parts, its text encoder and VAE: read without copying, and found in a ComfyUI models folder."""

import json
import os
from collections.abc import Callable, Iterable
from pathlib import Path

from torch import Tensor

from .containers import PICKLES, SAFETENSORS, open_container

FOLDERS = {
    "student": ("diffusion_models", "unet"),
    "text-encoder": ("text_encoders", "clip"),
    "vae": ("vae",),
}
"""Where in ComfyUI's models folder a part lies."""


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a file or of a folder of files; mapped, not read.

    Raises ValueError, one line, for what is none, or holds anything but tensors.
    """
    tree = open_container(path).tree
    if not all(isinstance(value, Tensor) for value in tree.values()):
        raise ValueError(f"{path}: holds other things than tensors by name; give a file of weights")
    return dict(tree)


def read_config(folder: Path) -> dict:
    """config.json of such a folder. Raises ValueError where there is none."""
    path = folder / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: cannot be read ({error}); give a folder as diffusers writes it") from None
    if not isinstance(config, dict):
        raise ValueError(f"{path}: not a JSON object")
    return config


def subfolder(path: Path, name: str) -> Path:
    """The part of a whole model's folder that is called so, or the path itself."""
    return path / name if (path / name).is_dir() else path


def default_models_dir(given: Path | None) -> Path | None:
    """ComfyUI's models folder: the one given, else that of $COMFYUI_PATH where it is set. Raises ValueError."""
    if given is None and os.environ.get("COMFYUI_PATH"):
        given = Path(os.environ["COMFYUI_PATH"]) / "models"
    if given is not None and not given.is_dir():
        raise ValueError(f"--models-dir: {given} is no folder; give ComfyUI's folder `models`")
    return given


def locate_student(name: str, models_dir: Path | None) -> Path | None:
    """The student's file; None for the built-in one, `demo`. Raises ValueError, one line."""
    return None if name == "demo" else locate("student", name, default_models_dir(models_dir))


def locate(kind: str, name: str, models_dir: Path | None) -> Path:
    """A part by path, or by its name in the models folder. Raises ValueError, one line, where it is in neither."""
    if Path(name).exists():
        return Path(name)
    tried = [models_dir / folder / name for folder in FOLDERS[kind]] if models_dir else []
    for path in tried:
        if path.exists():
            return path
    others = "".join(f", nor {path}" for path in tried)
    raise ValueError(f"--{kind}: {name}: no such file{others}")


def find(kind: str, models_dir: Path, why_not: Callable[[dict[str, Tensor]], str]) -> Path:
    """The one file of the models folder whose tensors are such a part; `why_not` is empty for one that fits.

    Raises ValueError, one line, that lists the candidates where there is none or more than one.
    """
    folders = [models_dir / folder for folder in FOLDERS[kind]]
    files = sorted(file for folder in folders for file in folder.rglob("*") if _is_weights(file))
    fits = [file for file in files if _fits(file, why_not)]
    if len(fits) == 1:
        return fits[0]
    where = " and ".join(map(str, folders))
    if fits:
        raise ValueError(f"--{kind}: {len(fits)} files fit, give one of them: {_names(fits)}")
    raise ValueError(
        f"--{kind}: none of {len(files)} files in {where} is one for Wan 2.1 ({_names(files)}); give its path"
    )


def _is_weights(file: Path) -> bool:
    return file.is_file() and file.suffix.lower() in (*SAFETENSORS, *PICKLES)


def _fits(file: Path, why_not: Callable[[dict[str, Tensor]], str]) -> bool:
    try:
        return not why_not(read_tensors(file))
    except ValueError:
        return False


def _names(files: Iterable[Path]) -> str:
    return ", ".join(file.name for file in files) or "no file"
