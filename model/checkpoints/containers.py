"""Files and folders -> named tensors, memory-mapped; nothing in a file is executed. A state dict -> safetensors.

The first bytes of a file decide how it is read, not its name. Every message is one line.
"""

import io
import json
import pickle
import re
import struct
import warnings
import zipfile
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from ...memory.fields import brief, json_object, quoted
from ...memory.files import MAX_TENSORS, atomic_path, read_text
from ...memory.kinds import NUM_BYTES, kind_of

SAFETENSORS = (".safetensors", ".sft")
PICKLES = (".pt", ".pth", ".ckpt", ".bin", ".pkl")
MAX_DEPTH = 16
"""Dicts and lists inside each other that a pickle may have."""
MAX_PICKLE = 2**22
"""Bytes of the pickle in a torch file, without its tensors."""
MAX_READS = 2**20
"""Reads of a pickle in the format before torch 1.6, about 40 for each tensor."""

SAFE_TORCH = (2, 6)
"""Older versions can execute code in a file even with weights_only (CVE-2025-32434)."""

LOAD_ERRORS = (
    pickle.UnpicklingError, RuntimeError, ValueError, TypeError, LookupError, AttributeError, EOFError, AssertionError,
    OverflowError, OSError, struct.error, zipfile.BadZipFile,
)  # fmt: skip
"""What torch.load raises for files that are damaged or hold something else."""

NO_TENSORS = {
    b"GGUF": "a GGUF file; in ComfyUI use the Unet Loader (GGUF) of ComfyUI-GGUF, elsewhere give a .safetensors file",
    b"version https://git-lfs": "a git-lfs pointer, not the file; run `git lfs pull`",
    b"<": "a web page, not a model; download the file again",
}
"""First bytes of other files, and what they are."""

DTYPE_NAMES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3", torch.float8_e5m2: "F8_E5M2",
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Container:
    """The contents of a file or folder, as stored."""

    path: Path
    kind: str
    tree: Mapping
    """Tensors by name, or dicts of them by name."""
    metadata: Mapping[str, str] = field(default_factory=dict)
    config: Mapping = field(default_factory=dict)
    """A folder's config.json."""
    scheduler: str = ""
    """Class of the scheduler in a diffusers folder."""

    @property
    def sets(self) -> tuple[str, ...]:
        """Names of the dicts of tensors; empty for a flat file."""
        return tuple(str(name) for name, value in self.tree.items() if _holds_tensors(value))

    def take(self, names: Sequence[str]) -> tuple[str, dict[str, Tensor]]:
        """The tensors under the first of `names` at each level, and the names on the way.

        Raises ValueError where there are no tensors, or other values among them.
        """
        tree, way = self.tree, []
        while name := next((name for name in names if _holds_tensors(tree.get(name))), None):
            way.append(name)
            tree = tree[name]
        if not any(isinstance(value, Tensor) for value in tree.values()):
            sets = ", ".join(name if name.isprintable() else repr(name) for name in self.sets) or "no tensors"
            if "lora" in sets:
                raise ValueError(f"{self.path}: a LoRA ({sets}); give its student, and this file as --lora")
            raise ValueError(f"{self.path}: holds {sets}; a student is expected under {', '.join(names)}")
        for name, value in tree.items():
            if not isinstance(name, str) or not isinstance(value, Tensor):
                raise ValueError(f"{self.path}: {quoted(name)} is not a tensor; give a file of tensors only")
        return ".".join(way), dict(tree)


def _holds_tensors(value: object) -> bool:
    return isinstance(value, dict) and any(isinstance(v, Tensor) or _holds_tensors(v) for v in value.values())


def open_container(path: str | Path) -> Container:
    """Open a file, a folder in diffusers' or Wan's layout, or the index of a model in parts. Raises ValueError."""
    path = Path(path)
    if path.is_dir():
        return _open_folder(path)
    if path.name.endswith(".index.json"):
        return _open_parts(path, path)
    if part := re.fullmatch(r"(.+)-\d{5}-of-(\d{5})(\.\w+)", path.name):
        index = path.with_name(f"{part[1]}{part[3]}.index.json")
        if index.is_file():
            return _open_parts(path, index)
        if path.is_file() and int(part[2]) > 1:
            raise ValueError(f"{path}: one of {int(part[2])} parts; put their index, {index.name}, beside it")
    kind, tree, metadata = _read_file(path)
    return Container(path=path, kind=kind, tree=tree, metadata=metadata)


def _read_file(path: Path) -> tuple[str, Mapping, dict[str, str]]:
    try:
        with open(path, "rb") as f:
            start = f.read(NUM_BYTES)
    except FileNotFoundError:
        raise ValueError(f"{path}: no such file") from None
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror})") from None
    if kind := kind_of(start):
        raise ValueError(f"{path}: is {kind}, not a model; give a file of weights")
    # First, because the length of a safetensors header can begin like any other file.
    if start[8:9] == b"{" and int.from_bytes(start[:8], "little") <= path.stat().st_size:
        return "safetensors", *read_safetensors(path)
    for first, problem in NO_TENSORS.items():
        if start.lstrip().startswith(first):
            raise ValueError(f"{path}: {problem}")
    if start.startswith((b"PK\x03\x04", b"\x80")):
        return "torch pickle", read_pickle(path), {}
    if path.suffix.lower() in SAFETENSORS:
        return "safetensors", *read_safetensors(path)
    raise ValueError(f"{path}: neither a safetensors nor a torch file; give a .safetensors, .pt, .pth, .ckpt or .bin")


def read_safetensors(path: str | Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors, memory-mapped, and metadata. Raises ValueError for a missing, truncated or other file."""
    if not Path(path).is_file():
        raise ValueError(f"{path}: no such file")
    try:
        with safe_open(path, "pt") as f:
            names = f.keys()
            if len(names) > MAX_TENSORS:
                raise ValueError(f"{path}: holds {len(names)} tensors, more than {MAX_TENSORS}; give a student's file")
            return {name: f.get_tensor(name) for name in names}, f.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path}: not a complete safetensors file ({brief(error)}); download it again") from None


def read_pickle(path: Path) -> dict:
    """Dicts of tensors that torch.save wrote. Raises ValueError for a damaged file, and for objects or code in it."""
    if tuple(int(part) for part in torch.__version__.split(".")[:2]) < SAFE_TORCH:
        raise ValueError(f"{path}: torch {torch.__version__} cannot read it safely; install torch 2.6 or newer")
    try:
        with warnings.catch_warnings(), _PickleFile(path) as f:
            warnings.simplefilter("ignore")
            if is_zip := f.peek(2)[:2] == b"PK":
                _check_zip(path)
            # torch.save before 1.6 wrote files that cannot be mapped. torch reads a path by its suffix.
            is_mapped = is_zip and path.suffix.lower() not in SAFETENSORS
            tree = torch.load(path if is_mapped else f, map_location="cpu", weights_only=True, mmap=is_mapped)
    except LOAD_ERRORS as error:
        message = " ".join(str(error).split())
        if name := re.search(r"GLOBAL (\w[\w.]*)|[Uu]nsupported class (\w[\w.]*)", message):
            raise _not_plain(path, name[1] or name[2]) from None
        if "TorchScript" in message:
            raise _not_plain(path, "a TorchScript program") from None
        message = message.rpartition("WeightsUnpickler error: ")[2].partition(". ")[0]
        raise ValueError(f"{path}: not a complete torch file ({brief(message, 120)}); download it again") from None
    if not isinstance(tree, dict):
        raise ValueError(f"{path}: holds a {type(tree).__name__}, not tensors by name; give a student's state dict")
    _check_plain(path, tree, (), set())
    return tree


class _PickleFile(io.BufferedReader):
    """A file that ends a pickle of too many parts: the time to refuse one does not grow with its size."""

    def __init__(self, path: Path):
        super().__init__(io.FileIO(path))
        self._reads = 0

    def read(self, size: int | None = -1, /) -> bytes:
        self._reads += 1
        if self._reads > MAX_READS:
            raise pickle.UnpicklingError(f"more than {MAX_READS} parts. ")
        return super().read(size)


def _check_zip(path: Path) -> None:
    """Raises ValueError for a zip that is larger unpacked, and for one with a large pickle."""
    with zipfile.ZipFile(path) as file:
        entries = file.infolist()
    if sum(entry.file_size for entry in entries) > path.stat().st_size:
        raise ValueError("it is compressed, torch.save compresses nothing")
    if any(entry.file_size > MAX_PICKLE for entry in entries if entry.filename.endswith(".pkl")):
        raise ValueError(f"its pickle has more than {MAX_PICKLE} bytes")


def _not_plain(path: Path, content: str) -> ValueError:
    return ValueError(f"{path}: holds {content}; only tensors are read, ask the author for a .safetensors file")


def _check_plain(path: Path, value, above: tuple[int, ...], checked: set[int]) -> None:
    """Raises ValueError unless a tree is tensors, numbers and text in dicts and lists, none of them inside itself."""
    if type(value) in (dict, OrderedDict, defaultdict, list, tuple, set, torch.Size):
        if len(above) == MAX_DEPTH or id(value) in above:
            raise ValueError(f"{path}: holds dicts inside themselves, or more than {MAX_DEPTH} deep; give a state dict")
        if id(value) not in checked:
            for part in [*value.keys(), *value.values()] if isinstance(value, dict) else value:
                _check_plain(path, part, (*above, id(value)), checked)
            checked.add(id(value))
    elif type(value) in (Tensor, nn.Parameter):
        if value.layout != torch.strided or value.is_quantized or value.is_meta:
            raise _not_plain(path, f"a {value.dtype} {value.layout} tensor on {value.device}")
    elif not isinstance(value, (int, float, str, type(None))) or type(value).__module__ != "builtins":
        raise _not_plain(path, f"a {type(value).__name__}")


def _open_folder(folder: Path) -> Container:
    for place in (folder, folder / "transformer"):
        files = sorted(place.glob("*"))
        kinds = [[file for file in files if file.name.endswith(".index.json")]]
        kinds += [[file for file in files if file.suffix.lower() in suffixes] for suffixes in (SAFETENSORS, PICKLES)]
        models = next(filter(None, kinds), [])
        if len(models) > 1:
            raise ValueError(f"{folder}: holds {', '.join(file.name for file in models)}; give one of them")
        if models:
            inside = open_container(models[0])
            scheduler = {}
            for root in (folder, place.parent):
                scheduler = read_json(root / "scheduler" / "scheduler_config.json", scheduler)
            return replace(
                inside, path=folder, kind=f"folder, {inside.kind}", config=read_json(place / "config.json", {}),
                scheduler=str(scheduler.get("_class_name", "")),
            )  # fmt: skip
    raise ValueError(
        f"{folder}: no .safetensors, .pt or *.index.json in it or in its transformer folder; give the file"
    )


def _open_parts(path: Path, index: Path) -> Container:
    """The tensors of all parts, exactly those that the index lists."""
    listed = read_json(index).get("weight_map")
    if not isinstance(listed, dict) or not listed or not all(isinstance(part, str) for part in listed.values()):
        raise ValueError(f"{index}: not an index of parts, it has no weight_map; download it again")
    parts, tree, metadata = sorted(set(listed.values())), {}, {}
    for part in parts:
        if Path(part).name != part:
            raise ValueError(f"{index}: lists {part}, which is not a file beside it; download the index again")
        if not (index.parent / part).is_file():
            raise ValueError(f"{index}: lists {part}, which is not there; download all {len(parts)} parts")
        _, tensors, metadata = _read_file(index.parent / part)
        expected = {name for name, place in listed.items() if place == part}
        if wrong := sorted(expected ^ tensors.keys()):
            raise ValueError(f"{index}: {part} and the index disagree about {wrong[0]}; download it again")
        tree |= tensors
    config = read_json(index.parent / "config.json", {})
    return Container(path=path, kind=f"{len(parts)} parts", tree=tree, metadata=metadata, config=config)


def read_json(path: Path, missing: dict | None = None) -> dict:
    """The object in a JSON file; `missing` if there is no such file. Raises ValueError for anything else."""
    if missing is not None and not path.is_file():
        return missing
    return json_object(read_text(path), path)


def write_safetensors(
    path: Path,
    kept: Mapping[str, tuple[torch.dtype, Sequence[int]]],
    tensor_of: Callable[[str], Tensor],
    metadata: Mapping[str, str],
) -> None:
    """Write tensors of known dtype and shape one after the other, so that only one is in memory.

    The file is complete or does not exist. Raises ValueError where it cannot be written.
    """
    names = sorted(kept, key=lambda name: (-kept[name][0].itemsize, name))  # so that every tensor is aligned
    header: dict[str, object] = {"__metadata__": dict(metadata)}
    end = 0
    for name in names:
        dtype, shape = kept[name]
        begin, end = end, end + dtype.itemsize * torch.Size(shape).numel()
        header[name] = {"dtype": DTYPE_NAMES[dtype], "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_path(path) as part, open(part, "wb") as f:
            f.write(struct.pack("<Q", len(text)) + text)
            for name in names:
                tensor = tensor_of(name).detach().to("cpu", kept[name][0]).contiguous()
                f.write(tensor.reshape(-1).view(torch.uint8).numpy().data)
    except OSError as error:
        raise ValueError(f"{path}: cannot be written ({error.strerror})") from None
