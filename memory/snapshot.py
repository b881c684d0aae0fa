"""A memory on disk: one safetensors file.

As it is saved: with its keys and values, then continuing from it is bit-identical; or compact, without them, then
they are made anew from the film when it is continued.
"""

import dataclasses
import functools
import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from .config import RELEASED, MemoryConfig
from .layer_store import LayerSlots, ReleasedMemory
from .memory import FrameKV, Memory, Segment, all_finite
from .policy import Decision, Slots

HEADER_KEY = "context_forcing_memory"
DIGEST_KEY = "sha256"
VERSION = 2
FILE_NAMES = {"similarity_to_previous": "likeness"}
"""Fields that the file has under other names."""
FIELD_NAMES = {name: field for field, name in FILE_NAMES.items()}


def save_memory(path: str | Path, memory: Memory) -> None:
    """Write a memory, with its keys and values if it has them. The file is whole or not there."""
    path = Path(path)
    header = {
        "version": VERSION,
        "form": "compact" if memory.is_compact else "exact",
        "student": memory.student,
        "scene_begins": memory.scene_begins,
        "config": dataclasses.asdict(memory.config),
        "latent_size": memory.latent_size,
        "slots": {FILE_NAMES.get(name, name): value for name, value in dataclasses.asdict(memory.slots).items()},
        "chunks": [chunk.shape[2] for chunk in memory.latent_chunks],
        "decisions": [dataclasses.astuple(decision) for decision in memory.decisions],
        "segments": [dataclasses.astuple(segment) for segment in memory.segments],
    }
    if isinstance(memory, ReleasedMemory):
        header["layers"] = [[layer.frames, layer.num_slow] for layer in memory.layers]
        tensors = {name: tensor for n, layer in enumerate(memory.layers) for name, tensor in _layer_out(n, layer)}
    else:
        tensors = {
            f"{part}.{frame}": getattr(held, part).cpu().contiguous()
            for frame, held in memory.remembered.items()
            for part in ("keys", "values")
        }
    if memory.latent_chunks:
        tensors["film"] = torch.cat(memory.latent_chunks, dim=2)
    for name, tensor in (("text", memory.text), ("given", memory.start_latents)):
        if tensor is not None:
            tensors[name] = tensor.contiguous()
    # Inside the header: safetensors writes several metadata keys in no fixed order.
    text = json.dumps({**header, DIGEST_KEY: digest(header, tensors)})
    part = path.with_name(path.name + ".part")
    try:
        save_file(tensors, part, {HEADER_KEY: text})
        # On the disk before it has its name: `generate` then gives up its journal.
        with open(part, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(part, path)
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{path}: cannot be written ({error})") from None
    finally:
        part.unlink(missing_ok=True)


def digest(header: dict, tensors: dict[str, torch.Tensor]) -> str:
    """Fingerprint of a whole snapshot: header, names, shapes, types and every byte."""
    sha = hashlib.sha256(json.dumps(header).encode())
    for name, tensor in sorted(tensors.items()):
        sha.update(f"{name}{tensor.dtype}{tuple(tensor.shape)}".encode())
        sha.update(tensor.contiguous().flatten().view(torch.uint8).numpy())
    return sha.hexdigest()


def load_memory(path: str | Path, student: str = "") -> Memory:
    """Read a memory, for the student with this fingerprint if one is given; samplers check that again.

    Raises ValueError, one line, for another student, a damaged file or one that is no memory; nothing is half-loaded.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"{path}: no such file")
    try:
        with safe_open(path, "pt") as f:
            metadata = f.metadata() or {}
            tensors = {key: f.get_tensor(key) for key in f.keys()}
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path}: not a whole safetensors file ({error})") from None
    if HEADER_KEY not in metadata:
        raise ValueError(f"{path}: not a memory; it has no {HEADER_KEY} header")
    try:
        header = json.loads(metadata[HEADER_KEY])
        version = header["version"]
        if version != VERSION:
            raise ValueError(f"version {version} was written by another version of this software, {VERSION} is known")
        if student and header["student"] not in ("", student):
            raise ValueError(
                "made by another student; keys of one network mean nothing to another, load the student it came from"
            )
        if header.pop(DIGEST_KEY, None) != digest(header, tensors):
            raise ValueError("damaged: its contents do not have the digest it was saved with; use another copy")
        if bad := [name for name, tensor in tensors.items() if not all_finite([tensor])]:
            raise ValueError(
                f"NaN or infinity in its {bad[0]}: what made it had failed before it was saved; go on from an earlier"
                " memory"
            )
        return _build(header, tensors)
    except (KeyError, TypeError, AttributeError, RecursionError, json.JSONDecodeError) as error:
        raise ValueError(f"{path}: damaged header ({error!r})") from None
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def _layer_out(number: int, layer: LayerSlots) -> Iterator[tuple[str, torch.Tensor]]:
    yield f"keys.{number}", torch.stack([entry.keys for entry in layer.entries]).cpu()
    yield f"values.{number}", torch.stack([entry.values for entry in layer.entries]).cpu()
    yield f"descriptor.{number}", layer.descriptor.cpu()


def _layers_in(header: dict, tensors: dict[str, torch.Tensor]) -> tuple[LayerSlots, ...]:
    layers = []
    for number, (frames, num_slow) in enumerate(header["layers"]):
        keys, values = tensors[f"keys.{number}"], tensors[f"values.{number}"]
        if not len(frames) == len(keys) == len(values) or type(num_slow) is not int or not 0 <= num_slow < len(frames):
            raise ValueError(f"damaged: layer {number} does not hold what its header says")
        layers.append(
            LayerSlots(
                frames=tuple(frames),
                entries=tuple(FrameKV(k.contiguous(), v.contiguous()) for k, v in zip(keys, values)),
                num_slow=num_slow,
                descriptor=tensors[f"descriptor.{number}"],
            )
        )
    return tuple(layers)


def _build(header: dict, tensors: dict[str, torch.Tensor]) -> Memory:
    slots = Slots(**{FIELD_NAMES.get(name, name): tuple(value) for name, value in header["slots"].items()})
    config = MemoryConfig.from_dict(header["config"])
    channels, height, width = header["latent_size"]
    chunks = header["chunks"]
    is_released = config.policy == RELEASED
    remembered = slots.all if header["form"] == "exact" and not is_released else ()
    text, given = tensors.get("text"), tensors.get("given")
    for name, right in {
        "form": header["form"] in ("exact", "compact"),
        "chunks": all(type(length) is int and length > 0 for length in chunks),
        "slots": len(set(slots.all)) == len(slots.all) and len(slots.similarity_to_previous) == len(slots.fast),
        "text": text is None or (text.ndim == 3 and text.shape[0] == 1),
        "given": given is None
        or (given.ndim == 5 and (*given.shape[:2], *given.shape[3:]) == (1, channels, height, width)),
    }.items():
        if not right:
            raise ValueError(f"damaged: its {name} cannot be")
    expected = {f"{part}.{frame}" for frame in remembered for part in ("keys", "values")}
    if is_released:
        parts = ("keys", "values", "descriptor")
        expected = {f"{part}.{layer}" for layer in range(len(header["layers"])) for part in parts}
    expected |= {"film"} if chunks else set()
    if expected != tensors.keys() - {"text", "given"}:
        raise ValueError(f"damaged: tensors {sorted(expected ^ tensors.keys())[:3]} are missing or extra")
    film = tensors["film"] if chunks else torch.zeros(1, channels, 0, height, width)
    if film.shape != (1, channels, sum(chunks), height, width):
        raise ValueError(f"damaged: the film has shape {tuple(film.shape)}, its header says otherwise")
    if any(not 0 <= frame < film.shape[2] for frame in slots.all):
        raise ValueError("damaged: it remembers frames that the film does not have")
    held = {frame: FrameKV(tensors[f"keys.{frame}"], tensors[f"values.{frame}"]) for frame in remembered}
    layers = _layers_in(header, tensors) if is_released else ()
    entries = (*held.values(), *(entry for layer in layers for entry in layer.entries))
    if len({tuple(tensor.shape) for each in entries for tensor in (each.keys, each.values)}) > 1:
        raise ValueError("damaged: remembered frames differ in shape")
    kind = functools.partial(ReleasedMemory, layers=layers) if is_released else Memory
    return kind(
        config=config,
        latent_size=(channels, height, width),
        slots=slots,
        remembered=held,
        latent_chunks=tuple(chunk.contiguous() for chunk in film.split(chunks, dim=2)) if chunks else (),
        decisions=tuple(Decision(*decision) for decision in header["decisions"]),
        segments=tuple(Segment(*segment) for segment in header["segments"]),
        student=header["student"],
        text=text,
        start_latents=given,
        scene_begins=header["scene_begins"],
    )
