"""A memory in one safetensors file.

An exact file has keys and values: the video continues bit for bit. A compact file has latents only; keys and values are
computed again when the video continues.
"""

import dataclasses
import hashlib
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from .config import MemoryConfig
from .fields import brief
from .files import MAX_TENSORS, atomic_path
from .header import check_header, check_kinds
from .kinds import HEADER_KEY, MEMORY, NUM_BYTES, kind_of
from .memory import Memory, Segment, all_finite, store_class
from .policy import Decision, Slots
from .recall import Recall
from .references import Reference, reference_frames
from .stores import FrameKV

DIGEST_KEY = "sha256"
GIVE = "give the file of --memory-out, or of the node Save Memory"
VERSION = 2
SLOT_NAMES = ("sink", "slow", "fast", "likeness")
"""The fields of Slots in a file."""


def save_memory(path: str | Path, memory: Memory) -> None:
    """Write a memory atomically, with keys and values if it has them. Raises ValueError if it cannot be written."""
    store_header, tensors = memory.store.state()
    header = {
        "version": VERSION,
        "form": "compact" if memory.unread else "exact",
        "student": memory.student,
        "scene_begins": memory.scene_begins,
        "config": dataclasses.asdict(memory.config),
        "latent_size": memory.latent_size,
        "slots": dict(zip(SLOT_NAMES, dataclasses.astuple(memory.slots))),
        "chunks": [chunk.shape[2] for chunk in memory.latent_chunks],
        "decisions": [dataclasses.astuple(decision) for decision in memory.decisions],
        "segments": [dataclasses.astuple(segment) for segment in memory.segments],
        **store_header,
    }
    numbers, distinct = _numbered((*memory.texts, *(each.text for each in memory.references)))
    tensors |= {f"text.{number}": text.clone() for number, text in enumerate(distinct)}
    if memory.config.recalls:
        header["recalls"] = [dataclasses.astuple(recall) for recall in memory.recalls]
        header["texts"] = numbers[: len(memory.texts)]
    if memory.references:
        prompts = [each.prompt for each in memory.references]
        header["references"] = list(zip(prompts, numbers[len(memory.texts) :]))
        tensors["references"] = torch.cat([each.latents for each in memory.references], dim=2).contiguous()
    if memory.latent_chunks:
        tensors["film"] = torch.cat(memory.latent_chunks, dim=2)
    for name, tensor in (("text", memory.text), ("given", memory.start_latents)):
        if tensor is not None:
            tensors[name] = tensor.contiguous()
    # The digest is part of the header: safetensors writes several metadata keys in no fixed order.
    text = json.dumps({**header, DIGEST_KEY: digest(header, tensors)})
    try:
        with atomic_path(Path(path)) as part:
            save_file(tensors, part, {HEADER_KEY: text})
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{path}: cannot be written ({error})") from None


def _numbered(texts: Sequence[torch.Tensor | None]) -> tuple[list[int | None], list[torch.Tensor]]:
    """For every text its number among the different ones, and the different ones."""
    numbers: list[int | None] = []
    distinct: list[torch.Tensor] = []
    for text in texts:
        if text is not None and not any(torch.equal(text, other) for other in distinct):
            distinct.append(text)
        numbers.append(None if text is None else next(i for i, each in enumerate(distinct) if torch.equal(text, each)))
    return numbers, distinct


def digest(header: dict, tensors: dict[str, torch.Tensor]) -> str:
    """SHA-256 of a snapshot: header, names, shapes, types and every byte."""
    sha = hashlib.sha256(json.dumps(header).encode())
    for name, tensor in sorted(tensors.items()):
        sha.update(f"{name}{tensor.dtype}{tuple(tensor.shape)}".encode())
        sha.update(_bytes(tensor))
    return sha.hexdigest()


def _bytes(tensor: torch.Tensor) -> memoryview:
    return tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data


def read_header(path: str | Path) -> str:
    """The header of a memory's file, as JSON. Raises ValueError, one line, for a missing, damaged or foreign file."""
    path = Path(path)
    if path.is_dir():
        raise ValueError(f"{path}: is a folder; {GIVE}")
    if not path.is_file():
        raise ValueError(f"{path}: no such file; check the name")
    try:
        with path.open("rb") as file:
            first = file.read(NUM_BYTES)
        if (kind := kind_of(first)) not in ("", MEMORY):
            raise ValueError(f"{path}: is {kind}; {GIVE}")
        if first[8:9] != b"{":
            raise ValueError(f"{path}: not a memory file; {GIVE}")
        with safe_open(path, "pt") as f:
            metadata = f.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path}: not a whole safetensors file ({brief(error)}); use another copy") from None
    if HEADER_KEY not in metadata:
        raise ValueError(f"{path}: not a memory file, it has no {HEADER_KEY} header; {GIVE}")
    return metadata[HEADER_KEY]


def load_memory(path: str | Path, student: str = "") -> Memory:
    """Read a memory; with `student`, only one of the student with this fingerprint.

    Raises ValueError for the memory of another student, and for a damaged or foreign file.
    """
    header_text = read_header(path)
    try:
        with safe_open(path, "pt") as f:
            if len(names := f.keys()) > MAX_TENSORS:
                raise ValueError(f"holds {len(names)} tensors, more than {MAX_TENSORS}; use another copy")
            check_kinds({name: f.get_slice(name).get_dtype() for name in names})
            tensors = {name: f.get_tensor(name) for name in names}
        header = json.loads(header_text)
        if header["version"] != VERSION:
            raise ValueError(f"version: {header['version']} is not supported, only {VERSION}; use another release")
        if student and header["student"] not in ("", student):
            raise ValueError("student: the memory belongs to another student; load the student that generated it")
        if header.pop(DIGEST_KEY, None) != digest(header, tensors):
            raise ValueError("damaged: the contents do not match their digest; use another copy")
        if bad := [name for name, tensor in tensors.items() if not all_finite([tensor])]:
            raise ValueError(f"NaN or infinity in {bad[0]}; continue from an earlier memory")
        return _build(header, tensors)
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path}: not a whole safetensors file ({brief(error)}); use another copy") from None
    except (LookupError, TypeError, AttributeError, RecursionError, json.JSONDecodeError) as error:
        raise ValueError(f"{path}: damaged header ({brief(repr(error))}); use another copy") from None
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def _build(header: dict, tensors: dict[str, torch.Tensor]) -> Memory:
    check_header(header)
    slots = Slots(*(tuple(header["slots"].pop(name)) for name in SLOT_NAMES))
    config = MemoryConfig.from_dict(header["config"])
    channels, height, width = header["latent_size"]
    chunks = header["chunks"]
    text, start = tensors.pop("text", None), tensors.pop("given", None)
    captions = header.get("references", ())
    numbers = [*header.get("texts", ()), *(number for _, number in captions)]
    distinct = [tensors.pop(f"text.{number}") for number in range(len({*numbers} - {None}))]
    all_texts = [None if number is None else distinct[number] for number in numbers]
    texts, own_texts = tuple(all_texts[: len(numbers) - len(captions)]), all_texts[len(numbers) - len(captions) :]
    pinned = tensors.pop("references") if captions else torch.zeros(1, channels, 0, height, width)
    start_size = None if start is None or start.ndim != 5 else (*start.shape[:2], *start.shape[3:])
    for name, is_valid in {
        "form": header["form"] in ("exact", "compact"),
        "chunks": all(length == config.chunk for length in chunks),
        "slots": not header["slots"] and len(set(slots.all)) == len(slots.all) and _fit(slots, config),
        "scene_begins": not (header["scene_begins"] and config.per_layer),
        "likeness": len(slots.similarity_to_previous) == len(slots.fast),
        "text": all(each.ndim == 3 and each.shape[0] == 1 for each in (text, *all_texts) if each is not None),
        "texts": len(texts) == (len(header["segments"]) if config.recalls else 0),
        "given": start is None or start_size == (1, channels, height, width),
        "references": pinned.shape == (1, channels, len(captions), height, width)
        and slots.references == reference_frames(captions)
        and len(captions) <= config.sink,
    }.items():
        if not is_valid:
            raise ValueError(f"damaged: {name} has an impossible value")
    film = tensors.pop("film") if chunks else torch.zeros(1, channels, 0, height, width)
    if film.shape != (1, channels, sum(chunks), height, width):
        raise ValueError(f"damaged: film has shape {tuple(film.shape)}, which does not fit the header")
    if any(not 0 <= frame < film.shape[2] for frame in slots.film):
        raise ValueError("damaged: slots have frames that the film does not have")
    store = store_class(config).from_state(config, slots, header, tensors)
    if tensors:
        raise ValueError(f"damaged: tensors {sorted(tensors)[:3]} do not belong to the memory")
    _check_kvs([kv for _, kv in store.frame_kvs()])
    return Memory(
        config=config,
        latent_size=(channels, height, width),
        store=store,
        latent_chunks=tuple(chunk.contiguous() for chunk in film.split(chunks, dim=2)) if chunks else (),
        decisions=tuple(Decision(*decision) for decision in header["decisions"]),
        segments=tuple(Segment(*segment) for segment in header["segments"]),
        recalls=tuple(Recall(frame, tuple(slow), reads) for frame, slow, reads in header.get("recalls", ())),
        student=header["student"],
        text=text,
        texts=texts,
        start_latents=start,
        scene_begins=header["scene_begins"],
        references=tuple(
            Reference(latents=latents.contiguous(), prompt=prompt, text=own)
            for latents, (prompt, _), own in zip(pinned.split(1, dim=2), captions, own_texts)
        ),
    )


def _fit(slots: Slots, config: MemoryConfig) -> bool:
    """Whether there are as many slots as between two chunks at most. Layers have a sink in common."""
    of_film = len(slots.slow) <= config.slow and len(slots.fast) <= config.fast - config.chunk
    return len(slots.sink) <= config.sink and (config.per_layer or of_film)


def _check_kvs(kvs: Sequence[FrameKV]) -> None:
    """Raises ValueError unless all keys and values have one shape, and those without scales one dtype."""
    parts = [part for kv in kvs for part in (kv.keys, kv.values)]
    if len({tuple(part.shape) for part in parts}) > 1:
        raise ValueError("damaged: keys and values differ in shape")
    if len({part.dtype for part in parts if isinstance(part, torch.Tensor)}) > 1 or any(
        type(kv.keys) is not type(kv.values) for kv in kvs
    ):
        raise ValueError("damaged: keys and values differ in dtype")


def fingerprint_memory(memory: Memory) -> str:
    """Short hash of a memory that a video begins from. Journals store it, so it must not change between releases."""
    slots = repr(memory.slots).replace("similarity_to_previous", "likeness")
    sha = hashlib.sha256(f"({memory.config}, {memory.latent_size}, {slots}, {memory.segments})".encode())
    others = [each for each in (memory.text, *memory.texts, memory.start_latents) if each is not None]
    stored = memory.store.tensors()
    _add(sha, (*memory.latent_chunks, *(others + stored if memory.config.per_layer else stored + others)))
    if memory.references:
        sha.update(fingerprint_references(memory.references).encode())
    return sha.hexdigest()[:16]


def fingerprint_references(references: Sequence[Reference]) -> str:
    """Short hash of references, for journals."""
    sha = hashlib.sha256(repr([(each.prompt, each.text is None) for each in references]).encode())
    _add(sha, [tensor for each in references for tensor in (each.latents, each.text) if tensor is not None])
    return sha.hexdigest()[:16]


def _add(sha: Any, tensors: Iterable[torch.Tensor]) -> None:
    """Add shapes and values of tensors to a hash."""
    for tensor in tensors:
        sha.update(str(tuple(tensor.shape)).encode())
        sha.update(_bytes(tensor))
