"""Files and folders -> named tensors, mapped into memory and never executed; and a state dict -> safetensors.

A file is known by its first bytes, not by its name. Every refusal is one line.
"""

import json
import pickle
import re
import struct
import warnings
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

NESTED = ("generator_ema", "generator", "model", "state_dict")
"""Names under which files hold a network, the one asked for first (method.md 2.3)."""

SAFETENSORS = (".safetensors", ".sft")
NESTING = 8
"""Dicts in each other that a checkpoint may have."""
PICKLES = (".pt", ".pth", ".ckpt", ".bin", ".pkl")

SAFE_TORCH = (2, 6)
"""Older ones could be made to execute code even when told to read weights only (CVE-2025-32434)."""

BROKEN = (
    pickle.UnpicklingError, RuntimeError, ValueError, TypeError, LookupError, AttributeError, EOFError, AssertionError,
    OverflowError, OSError, struct.error,
)  # fmt: skip
"""What torch.load raises for files that are damaged or hold something else."""

STORED_AS = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3", torch.float8_e5m2: "F8_E5M2",
}  # fmt: skip
"""dtypes of weights, as safetensors names them."""


@dataclass(frozen=True, kw_only=True)
class Container:
    """What a file or folder holds, as it is stored."""

    path: Path
    """What was asked for."""
    kind: str
    tree: Mapping
    """Tensors by name, or dicts of them by name."""
    metadata: Mapping[str, str] = field(default_factory=dict)
    config: Mapping = field(default_factory=dict)
    """A folder's config.json."""
    scheduler: str = ""
    """Class of the scheduler in a diffusers folder."""

    @property
    def held(self) -> tuple[str, ...]:
        """Names of the dicts with tensors in it; none for a flat file."""
        return tuple(str(name) for name, value in self.tree.items() if _holds_tensors(value))

    def take(self, order: Sequence[str]) -> tuple[str, dict[str, Tensor]]:
        """The tensors under the first of these names that is there, however deep; with the names on the way.

        Raises ValueError when there is none, or what is there is not tensors alone.
        """
        tree, way = self.tree, []
        while (name := next((name for name in order if _holds_tensors(tree.get(name))), None)) is not None:
            way.append(name)
            tree = tree[name]
        if not any(isinstance(value, Tensor) for value in tree.values()):
            held = ", ".join(self.held) or "no tensors"
            if "lora" in held:
                raise ValueError(f"{self.path}: a LoRA ({held}); give it beside the student it belongs to: --lora")
            raise ValueError(f"{self.path}: holds {held}; a student is looked for under {', '.join(order)}")
        for name, value in tree.items():
            if not isinstance(name, str) or not isinstance(value, Tensor):
                raise ValueError(f"{self.path}: {name!r} beside its tensors is none; give a file of tensors alone")
        return ".".join(way), dict(tree)


def _holds_tensors(value) -> bool:
    return isinstance(value, dict) and any(isinstance(v, Tensor) or _holds_tensors(v) for v in value.values())


def open_container(path: str | Path) -> Container:
    """A file, a folder in diffusers' or Wan's layout, or the index of shards. Raises ValueError, one line."""
    path = Path(path)
    if path.is_dir():
        return _open_folder(path)
    if not path.is_file():
        raise ValueError(f"{path}: no such file")
    if path.name.endswith(".index.json"):
        return _open_shards(path, path)
    if part := re.fullmatch(r"(.+)-\d{5}-of-(\d{5})(\.\w+)", path.name):
        index = path.with_name(f"{part[1]}{part[3]}.index.json")
        if index.is_file():
            return _open_shards(path, index)
        if int(part[2]) > 1:
            raise ValueError(f"{path}: one of {int(part[2])} parts; {index.name}, which lists them, must lie beside it")
    kind, tree, metadata = _read_file(path)
    return Container(path=path, kind=kind, tree=tree, metadata=metadata)


def _read_file(path: Path) -> tuple[str, Mapping, dict[str, str]]:
    try:
        with open(path, "rb") as f:
            start = f.read(64)
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror})") from None
    if start.startswith(b"GGUF"):
        raise ValueError(
            f"{path}: a GGUF file; in ComfyUI load it with ComfyUI-GGUF's Unet Loader (GGUF), our nodes take its MODEL;"
            " without ComfyUI take the same model as .safetensors"
        )
    if start.startswith(b"version https://git-lfs"):
        raise ValueError(f"{path}: a git-lfs pointer, not the file itself; run `git lfs pull` or download it again")
    if start.lstrip().startswith(b"<"):
        raise ValueError(f"{path}: a web page, not a model; the download failed, fetch the file itself")
    # A header's length may begin like a pickle: safetensors first.
    is_safetensors = start[8:9] == b"{" and int.from_bytes(start[:8], "little") <= path.stat().st_size
    if not is_safetensors and start.startswith((b"PK\x03\x04", b"\x80")):
        return "torch pickle", read_pickle(path), {}
    if is_safetensors or path.suffix.lower() in SAFETENSORS:
        return "safetensors", *read_safetensors(path)
    raise ValueError(f"{path}: neither a safetensors nor a torch file; give a .safetensors, .pt, .pth, .ckpt or .bin")


def read_safetensors(path: str | Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors, mapped, and metadata. Raises ValueError for a missing, truncated or foreign file."""
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"{path}: no such file")
    try:
        with safe_open(path, "pt") as f:
            return {key: f.get_tensor(key) for key in f.keys()}, f.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path}: not a whole safetensors file ({error})") from None


def read_pickle(path: Path) -> dict:
    """Dicts of tensors that torch.save wrote; nothing in the file is executed, or anything but plain data kept.

    Raises ValueError, one line, for a damaged file and for one that holds objects or code.
    """
    if tuple(int(part) for part in torch.__version__.split(".")[:2]) < SAFE_TORCH:
        raise ValueError(f"{path}: torch {torch.__version__} cannot read it safely; install torch 2.6 or newer")
    with open(path, "rb") as f:
        zipped = f.read(2) == b"PK"  # older ones cannot be mapped, they are read whole
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            tree = torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)
    except BROKEN as error:
        says = " ".join(str(error).split())
        if foreign := re.search(r"GLOBAL (\w[\w.]*)|[Uu]nsupported class (\w[\w.]*)", says):
            raise _not_plain(path, foreign[1] or foreign[2]) from None
        if "TorchScript" in says:
            raise _not_plain(path, "a TorchScript program") from None
        says = says.rpartition("WeightsUnpickler error: ")[2].partition(". ")[0]
        raise ValueError(f"{path}: not a whole torch file of tensors ({says[:120]}); download it again") from None
    if not isinstance(tree, dict):
        raise ValueError(f"{path}: holds a {type(tree).__name__}, not tensors by name; give a student's state dict")
    _check_plain(path, tree)
    _check_nesting(path, tree, (), set())
    return tree


def _not_plain(path: Path, what: str) -> ValueError:
    return ValueError(
        f"{path}: holds {what}, not only tensors; files with objects or code in them are not read, ask its author for"
        " .safetensors"
    )


def _check_plain(path: Path, tree) -> None:
    """Raises ValueError unless a tree is tensors, numbers and text in dicts and lists."""
    to_do, seen = [tree], set()
    while to_do:
        value = to_do.pop()
        if id(value) in seen:
            continue
        seen.add(id(value))
        if type(value) in (dict, OrderedDict, defaultdict):
            to_do += [*value.keys(), *value.values()]
        elif type(value) in (list, tuple, set, torch.Size):
            to_do += value
        elif type(value) in (Tensor, nn.Parameter):
            if value.layout != torch.strided or value.is_quantized or value.is_meta:
                raise _not_plain(path, f"a {value.dtype} {value.layout} tensor on {value.device}")
        elif not isinstance(value, (int, float, str, type(None))) or type(value).__module__ != "builtins":
            raise _not_plain(path, f"a {type(value).__name__}")


def _check_nesting(path: Path, tree: dict, above: tuple[dict, ...], done: set[int]) -> None:
    """Raises ValueError for dicts that lie in themselves, or too deep in each other."""
    if len(above) == NESTING or any(tree is one for one in above):
        raise ValueError(f"{path}: its dicts lie {NESTING} deep or in themselves; give a student's state dict")
    if id(tree) not in done:
        for value in tree.values():
            if isinstance(value, dict):
                _check_nesting(path, value, (*above, tree), done)
        done.add(id(tree))


def _open_folder(folder: Path) -> Container:
    for place in (folder, folder / "transformer"):
        files = sorted(place.glob("*")) if place.is_dir() else []
        found = [file for file in files if file.name.endswith(".index.json")]
        for suffixes in (SAFETENSORS, PICKLES):
            found = found or [file for file in files if file.suffix.lower() in suffixes]
        if len(found) > 1:
            raise ValueError(f"{folder}: holds {', '.join(file.name for file in found)}; give one of them")
        if found:
            inside = open_container(found[0])
            scheduler = read_json(place.parent / "scheduler" / "scheduler_config.json", {}) or read_json(
                folder / "scheduler" / "scheduler_config.json", {}
            )
            return Container(
                path=folder, kind=f"folder, {inside.kind}", tree=inside.tree, metadata=inside.metadata,
                config=read_json(place / "config.json", {}), scheduler=str(scheduler.get("_class_name", "")),
            )  # fmt: skip
    raise ValueError(f"{folder}: no .safetensors, .pt or *.index.json in it or in its transformer folder")


def _open_shards(path: Path, index: Path) -> Container:
    """Tensors of all parts, exactly those that the index lists."""
    listed = read_json(index).get("weight_map")
    if not isinstance(listed, dict) or not listed or not all(isinstance(part, str) for part in listed.values()):
        raise ValueError(f"{index}: not an index of parts, it has no weight_map")
    parts, tree, metadata = sorted(set(listed.values())), {}, {}
    for part in parts:
        if Path(part).name != part:
            raise ValueError(f"{index}: lists {part}, which is not a file beside it")
        if not (index.parent / part).is_file():
            raise ValueError(f"{index}: lists {part}, which is not there; download all {len(parts)} parts")
        _, tensors, metadata = _read_file(index.parent / part)
        here = {name for name, place in listed.items() if place == part}
        if wrong := sorted(here ^ tensors.keys()):
            raise ValueError(f"{index}: {part} and the index disagree about {wrong[0]}; download it again")
        tree |= tensors
    return Container(
        path=path, kind=f"{len(parts)} parts", tree=tree, metadata=metadata,
        config=read_json(index.parent / "config.json", {}),
    )  # fmt: skip


def read_json(path: Path, missing: dict | None = None) -> dict:
    """An object from a JSON file; `missing` where there is none. Raises ValueError for anything else."""
    if missing is not None and not path.is_file():
        return missing
    try:
        read = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{path}: cannot be read ({' '.join(str(error).split())})") from None
    if not isinstance(read, dict):
        raise ValueError(f"{path}: not a JSON object")
    return read


def write_safetensors(
    path: Path,
    kept: Mapping[str, tuple[torch.dtype, Sequence[int]]],
    tensor_of: Callable[[str], Tensor],
    metadata: Mapping[str, str],
) -> None:
    """Tensors of known dtype and shape to a file, one after the other: only one is in memory.

    The file is whole or not there. Raises ValueError where it cannot be written.
    """
    names = sorted(kept, key=lambda name: (-kept[name][0].itemsize, name))  # so that every tensor is aligned
    header, end = {"__metadata__": dict(metadata)}, 0
    for name in names:
        dtype, shape = kept[name]
        begin, end = end, end + dtype.itemsize * torch.Size(shape).numel()
        header[name] = {"dtype": STORED_AS[dtype], "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    part = path.with_name(path.name + ".part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(part, "wb") as f:
            f.write(struct.pack("<Q", len(text)) + text)
            for name in names:
                tensor = tensor_of(name).detach().to("cpu", kept[name][0]).contiguous()
                f.write(tensor.reshape(-1).view(torch.uint8).numpy())
        part.replace(path)
    except OSError as error:
        raise ValueError(f"{path}: cannot be written ({error.strerror})") from None
    finally:
        part.unlink(missing_ok=True)
