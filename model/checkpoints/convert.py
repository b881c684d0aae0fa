"""What `context-forcing convert` does: say what a file is, and write it as a student of our own."""

import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import torch

from ..config import StudentCard, WanConfig, published_size
from ..wan import WanModel
from .containers import write_safetensors
from .student import DEMO_STUDENT, StudentFile, StudentSource, student_metadata

DTYPES = {"keep": None, "bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
ORIGIN_KEY = "converted_from"


def convert(source: StudentSource, output: Path, dtype: str = "keep", force: bool = False) -> StudentFile:
    """Write a student of any layout as one of ours, tensor by tensor.

    Raises ValueError, one line, for what is no student and for a file that is there already, unless forced.
    """
    if dtype not in DTYPES:
        raise ValueError(f"dtype: {dtype!r} is not one of {', '.join(DTYPES)}")
    if output.suffix.lower() != ".safetensors":
        raise ValueError(f"output: {output} must end in .safetensors")
    if output.is_dir() or (output.exists() and not force):
        raise ValueError(f"output: {output} is there already; give another name, or --force to write over it")
    path = Path(source.path or DEMO_STUDENT)
    if output.exists() and path.exists() and output.samefile(path):
        raise ValueError(f"output: {output} is the file that is read; give another name")
    student = source.open()
    kept = {
        name: (DTYPES[dtype] or student.dtype_of(name), tuple(tensor.shape))
        for name, tensor in student.named.tensors.items()
    }
    origin = {
        "file": path.name,
        "weights": student.weights[0],
        "loras": [[x.path.name, x.strength] for x in student.loras],
    }
    metadata = student_metadata(student.config.num_heads, student.card) | {ORIGIN_KEY: json.dumps(origin)}
    write_safetensors(output, kept, student.tensor, metadata)
    return student


def inspect(source: StudentSource) -> list[tuple[str, str]]:
    """What a file is, a row each; the last one is `refused` where it cannot be used."""
    rows = [("file", str(source.path))]
    try:
        for row in _rows(StudentFile(source)):
            rows.append(row)
    except ValueError as error:
        rows.append(("refused", str(error)))
    return rows


def _rows(student: StudentFile) -> Iterator[tuple[str, str]]:
    """Rows in the order of reading, until a stage raises ValueError."""
    container = student.container
    yield "container", container.kind
    if container.held:
        yield "holds", ", ".join(container.held)
    taken, state = student.weights
    if taken:
        yield "taken", taken
    stored = Counter(str(tensor.dtype).removeprefix("torch.") for tensor in state.values())
    yield "stored as", ", ".join(f"{name} ({count})" for name, count in stored.most_common())
    named = student.named
    yield "layout", named.layout + (f", without {', '.join(named.removed)}" if named.removed else "")
    with torch.device("meta"):
        expected = WanModel(student.config).state_dict()
    fitting = sum(name in expected and tensor.shape == expected[name].shape for name, tensor in named.tensors.items())
    scaled = f", {len(named.scales)} of them scaled" if named.scales else ""
    yield "tensors", f"{fitting} of {len(expected)}{scaled}"
    yield "size", _size(student.config, sum(tensor.numel() for tensor in expected.values()))
    student.check()
    for lora in student.loras:
        yield "LoRA", f"{lora.path}: {len(lora.pairs) + len(lora.wholes)} weights, strength {lora.strength:g}"
    card = student.card
    yield "card", f"{card.name} ({student.card_choice.reason})"
    yield "", _steps(card)
    yield "", _memory(card)
    if student.note:
        yield "note", student.note


def _size(config: WanConfig, parameters: int) -> str:
    return (
        f"{published_size(config) or 'no published size'}: {parameters / 1e6:,.1f} M parameters, width {config.dim},"
        f" {config.num_layers} layers of {config.num_heads} heads"
    )


def _steps(card: StudentCard) -> str:
    listed = lambda steps: " ".join(f"{step:g}" for step in steps)
    steps = listed(card.steps) if len(card.steps) <= 8 else f"{len(card.steps)} from {card.steps[0]:g}"
    first = f", first chunk {listed(card.first_steps)}" if card.first_steps else ""
    return f"{card.base}: steps {steps}{first}, shift {card.shift:g}, {card.solver}"


def _memory(card: StudentCard) -> str:
    memory = card.memory
    return (
        f"chunk {memory.chunk}; remembers {memory.sink} sink, {memory.slow} slow, {memory.fast} fast of a window of"
        f" {memory.window}, policy {memory.policy}"
    )
