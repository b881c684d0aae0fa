"""Cards of published students; a file gets one by its content, never by its name (docs/students.md)."""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ...memory.config import MEMORY_PRESETS, MemoryConfig
from ...memory.fields import json_object, quoted
from ..config import StudentCard, WanConfig, published_size
from ..settings import parse_overrides, with_settings
from .containers import Container

LONGER = MemoryConfig()
"""Self-Forcing students were trained on all of up to 21 frames. Longer videos need a policy, which they do not define:
this is the package's default, within 21 frames."""
FOUR_STEPS = (1000.0, 750.0, 500.0, 250.0)


@dataclass(frozen=True, kw_only=True)
class PublishedStudent:
    """A published student; docs/students.md lists its repository and file."""

    card: StudentCard
    weights: str
    """The set of weights that its authors run, where a file has two."""
    hints: tuple[str, ...]
    """Words that suggest this student where a path has all words of one entry; for messages only."""
    differs: str
    """How the authors' own code differs from this package."""


def _student(name: str, memory: MemoryConfig, *hints: str, weights="generator_ema", differs="", **fields):
    card = StudentCard(**{"name": name, "stage": "published", "memory": memory, **fields})
    return PublishedStudent(card=card, weights=weights, hints=hints, differs=differs)


FRAMEWISE = dataclasses.replace(LONGER, chunk=1)
BASE = "wan2.1-base"

_STUDENTS = (
    _student("self-forcing", LONGER, "self_forcing", "self-forcing", "sfwan"),
    _student("self-gradient-forcing", MEMORY_PRESETS["longlive"], "self_gradient", "sgf", "chunkwise/ar/"),
    _student(
        "self-gradient-forcing-framewise",
        MemoryConfig(sink=4, slow=0, fast=17, chunk=1, policy="fifo"),
        "self_gradient framewise", "sgf framewise", "framewise/ar/",
    ),
    _student("causal-forcing", LONGER, "causal_forcing", "causal-forcing", weights="generator"),
    _student("causal-forcing-framewise", FRAMEWISE, "framewise"),
    _student("causal-forcing-2step", FRAMEWISE, "2step", steps=(1000.0, 500.0), first_steps=FOUR_STEPS),
    _student("causal-forcing-1step", FRAMEWISE, "1step", steps=(1000.0,), first_steps=FOUR_STEPS),
    _student(
        "longlive", MEMORY_PRESETS["longlive"], "longlive", weights="generator",
        differs="positions are ranks in the memory; the original uses absolute positions",
    ),
    _student("infinite-forcing", MEMORY_PRESETS["infinity-rope"], "infinite", "infinity"),
    _student(
        "reward-forcing", MemoryConfig(slow=0, fast=6, window=9, policy="fifo"), "reward",
        differs="the sink is fixed; the original adds 0.001 of every frame that leaves",
    ),
    _student(
        "memflow", MemoryConfig(slow=3, fast=9, window=15, policy="uniform", uniform_stride=9), "memflow",
        weights="generator",
        differs="slow memory keeps the last frame of every third chunk; the original those that match the prompt",
    ),
    _student(
        "krea-14b", MemoryConfig(sink=0, slow=0, fast=6, window=6, policy="fifo"), "krea", base="wan2.1-14b",
        differs="remembered frames are not encoded again for every chunk",
    ),
    _student(
        "livewan", MemoryConfig(sink=21, slow=0, fast=9, window=30, policy="fifo"), "livewan", "t14b_b64",
        steps=(1000.0, 500.0), shift=1.0, size=(640, 368), match_sink=1.0,
        differs="it continues a clip of 81 frames (start image or clip); positions are ranks in the memory and the clip"
        " is encoded in chunks, the original uses absolute positions and one pass",
    ),
    # commit_attends was not part of the training; docs/memory.md, The commit pass, has the figures.
    _student(
        "context-forcing", MEMORY_PRESETS["released"], "context_forcing", "context-forcing", commit_attends="fast only",
        differs="the commit pass attends to fast frames only; the original attends to all (commit_attends)",
    ),
    _student(
        BASE, LONGER, "wan2.1", "wan2_1", stage="bidirectional", shift=8.0, solver="euler",
        steps=tuple(float(step) for step in range(1000, 0, -20)),
        differs="it is not a causal student, so long videos degrade",
    ),
)  # fmt: skip
PUBLISHED: Mapping[str, PublishedStudent] = {student.card.name: student for student in _STUDENTS}
"""By name: what `--card` takes."""
DEFAULT = "self-forcing"
CARDS = ("auto", *PUBLISHED)
KNOWN = f"known students (docs/students.md): {', '.join(PUBLISHED)}"
"""The end of the message for a missing file, and for a file that is no student."""
CHOOSE = f"Choose with card: {', '.join(PUBLISHED)}"
ROLLING = ("longvideo", "rolling_forcing", "rollingforcing", "rolling-forcing")
"""Parts of a path that suggest a student of Rolling Forcing, which has no card (docs/students.md, Rolling Forcing)."""


@dataclass(frozen=True, kw_only=True)
class CardChoice:
    """The card of a file."""

    card: StudentCard
    reason: str
    note: str = ""
    """What a user should read before relying on the card; empty if the file has one."""


def published_student(name: str) -> PublishedStudent:
    """A published student by name. Raises ValueError for an unknown name."""
    if name not in PUBLISHED:
        raise ValueError(f"card: {quoted(name)} is not one of {', '.join(CARDS)}")
    return PUBLISHED[name]


def transformer_config(metadata: Mapping[str, str]) -> Mapping:
    """`transformer` in ComfyUI's `config` metadata; empty if there is none."""
    try:
        config = json_object(metadata.get("config", "{}"), "config").get("transformer")
    except ValueError:
        return {}
    return config if isinstance(config, dict) else {}


def choose_card(container: Container, weights: str, name: str, config: WanConfig, has_commit: bool) -> CardChoice:
    """The card of a file that has none of its own; `name` is a published student, or `auto`.

    `weights` is the set taken from the file; `has_commit`: it has weights for the commit pass. Raises ValueError for
    bidirectional weights with `auto`.
    """
    path, base = container.path, published_size(config) or "wan2.1"
    architecture = str(container.config.get("_class_name", ""))
    mark = mark_of(container, has_commit)
    if name != "auto":
        known, reason = published_student(name), f"requested: {name}"
        note = f"{path}: used as {name}; {known.differs}" if known.differs else ""
    elif container.scheduler == "SelfForcingFlowMatchScheduler":
        known, reason, note = PUBLISHED["self-forcing"], f"its scheduler is {container.scheduler}", ""
    elif architecture in ("WanModel", "WanTransformer3DModel"):
        raise ValueError(
            f"{path}: config.json names {architecture}, the bidirectional Wan 2.1; for a causal student choose card:"
            f" {', '.join(name for name in PUBLISHED if name != BASE)}; to use the model anyway, card: {BASE}"
        )
    elif mark:
        known, reason = PUBLISHED[mark[0]], f"recognised by {mark[1]}"
        note = f"{path}: the file has no card; {_use(known, reason)}.{_hint(path, known)} {CHOOSE}"
    else:
        known, reason = PUBLISHED[DEFAULT], f"default, the file has no card: {DEFAULT}"
        is_causal = weights.startswith("generator") or architecture.startswith("Causal")
        doubt = "" if is_causal else " and may not be a causal student"
        note = f"{path}: the file has no card{doubt}; {_use(known)}.{_hint(path, known)} {CHOOSE}"
    return CardChoice(card=dataclasses.replace(known.card, base=base), reason=reason, note=note)


def mark_of(container: Container, has_commit: bool) -> tuple[str, str] | None:
    """The published student whose mark a file has, and the mark; None for a file without any."""
    if has_commit:
        return "self-gradient-forcing", "weights for the commit pass (memory_*)"
    options = container.tree.get("args")
    if isinstance(options, Mapping) and "rope_gap_max" in options:
        return "livewan", "the training option rope_gap_max in it"
    if transformer_config(container.metadata).get("causal_ar") is True:
        return "causal-forcing-framewise", "ComfyUI's mark causal_ar in its metadata"
    return None


def _use(known: PublishedStudent, reason: str = "") -> str:
    """How a file without a card is used."""
    card, memory = known.card, known.card.memory
    steps, differs = " ".join(f"{step:g}" for step in card.steps), known.differs and f"; {known.differs}"
    return (
        f"{reason and reason + ', '}used as {card.name}: steps {steps}, shift {card.shift:g}, chunk {memory.chunk},"
        f" window {memory.window}{differs}"
    )


def _hint(path: Path, used: PublishedStudent) -> str:
    """What the name of a file and of its folders suggests, if not `used`; variants are tried before their family."""
    text = "/".join(path.absolute().parts[-3:]).lower()
    if any(hint in text for hint in ROLLING):
        return " Its name suggests Rolling Forcing, whose chunks are denoised together; here they are not."
    variants = (
        "causal-forcing-1step", "causal-forcing-2step", "self-gradient-forcing-framewise", "self-gradient-forcing",
        "causal-forcing-framewise",
    )  # fmt: skip
    for name in (*variants, *PUBLISHED):
        if any(all(word in text for word in hint.split()) for hint in PUBLISHED[name].hints):
            return f" Its name suggests {name}." if name != used.card.name else ""
    return ""


def override(card: StudentCard, overrides: Sequence[str]) -> StudentCard:
    """A card with fields replaced: `steps=1000,500`, `shift=3`, `memory.slow=0`; `memory.` may be left out.

    Raises ValueError for an unknown field or an impossible value.
    """
    inner = {f.name for f in dataclasses.fields(MemoryConfig)} - {f.name for f in dataclasses.fields(card)}
    overrides = [f"memory.{text}" if text.partition("=")[0] in inner else text for text in overrides]
    try:
        return with_settings(card, parse_overrides(overrides))
    except ValueError as error:
        raise ValueError(f"set: {error}") from None
