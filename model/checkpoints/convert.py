"""`context-forcing convert`: describe a file, and write it as a student with a card."""

import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import torch

from ..config import published_size
from ..device import dtype_named
from ..wan import WanModel
from .containers import write_safetensors
from .student import DEMO_STUDENT, StudentFile, StudentSource, student_metadata

KEEP = "keep"
ORIGIN_KEY = "converted_from"


def convert(source: StudentSource, output: Path, dtype: str = KEEP, force: bool = False) -> StudentFile:
    """Write a student of any layout under Wan's names with its card, tensor by tensor.

    Raises ValueError, one line, if the source is not a student, and for an existing output unless `force` is set.
    """
    chosen = None if dtype == KEEP else dtype_named(dtype)
    if output.suffix.lower() != ".safetensors":
        raise ValueError(f"output: {output} must end in .safetensors")
    if output.is_dir() or (output.exists() and not force):
        raise ValueError(f"output: {output} exists; give another name, or --force to overwrite it")
    path = Path(source.path or DEMO_STUDENT)
    if output.exists() and path.exists() and output.samefile(path):
        raise ValueError(f"output: {output} is the source; give another name")
    student = source.open()
    tensors, loras = student.stored, [[lora.path.name, lora.strength] for lora in student.loras]
    kept = {name: (chosen or student.dtype_of(name), tuple(tensor.shape)) for name, tensor in tensors.items()}
    origin = {"file": path.name, "weights": student.weights[0], "loras": loras}
    metadata = student_metadata(student.config.num_heads, student.card) | {ORIGIN_KEY: json.dumps(origin)}
    write_safetensors(output, kept, student.tensor, metadata)
    return student


def inspect(source: StudentSource) -> list[tuple[str, str]]:
    """A description of a file in rows; the last one is `refused` if it cannot be used."""
    rows = [("file", str(source.path or DEMO_STUDENT))]
    try:
        rows.extend(_rows(StudentFile(source)))
    except ValueError as error:
        rows.append(("refused", str(error)))
    return rows


def _rows(student: StudentFile) -> Iterator[tuple[str, str]]:
    """Rows in the order of reading, until a stage raises ValueError."""
    yield "container", student.container.kind
    if student.container.sets:
        yield "holds", ", ".join(student.container.sets)
    name, state = student.weights
    if name:
        yield "weights", name
    stored = Counter(str(tensor.dtype).removeprefix("torch.") for tensor in state.values())
    yield "stored as", ", ".join(f"{dtype} ({count})" for dtype, count in stored.most_common())
    named = student.named
    yield "layout", named.layout + (f", without {', '.join(named.removed)}" if named.removed else "")
    config = student.config
    with torch.device("meta"):
        expected = WanModel(config).state_dict()
    fitting = sum(key in expected and tensor.shape == expected[key].shape for key, tensor in named.tensors.items())
    also = ", and as many for the commit pass" if named.commit else ""
    yield "tensors", f"{fitting} of {len(expected)}" + (f", {len(named.scales)} scaled" if named.scales else "") + also
    millions = sum(x.numel() for x in expected.values()) / 1e6
    shape = f"width {config.dim}, {config.num_layers} layers of {config.num_heads} heads"
    yield "size", f"{published_size(config) or 'no published size'}: {millions:,.1f} M parameters, {shape}"
    student.check()
    for lora in student.loras:
        yield "LoRA", f"{lora.path}: {len(lora.pairs) + len(lora.wholes)} weights, strength {lora.strength:g}"
    card, memory = student.card, student.card.memory
    numbers = lambda steps: " ".join(f"{step:g}" for step in steps)
    steps = numbers(card.steps) if len(card.steps) <= 8 else f"{len(card.steps)} from {card.steps[0]:g}"
    first = f", first chunk {numbers(card.first_steps)}" if card.first_steps else ""
    yield "card", f"{card.name} ({student.card_choice.reason})"
    yield "", f"{card.base}: steps {steps}{first}, shift {card.shift:g}, {card.solver}"
    parts = f"{memory.sink} sink, {memory.slow} slow, {memory.fast} fast in a window of {memory.window}"
    yield "", f"chunk {memory.chunk}; memory: {parts}, policy {memory.policy}"
    if student.note:
        yield "note", student.note
