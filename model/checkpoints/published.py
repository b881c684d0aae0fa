"""Cards of published students, and which of them a file gets: by what is in it, never by its name (method.md 2.1)."""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ...memory.config import MEMORY_PRESETS, MemoryConfig
from ..config import CARD_KEY, StudentCard, WanConfig, published_size
from ..settings import parse_overrides, with_settings
from .containers import Container

LONGER = MemoryConfig()
"""Self-Forcing students saw all of up to 21 frames. Longer films need a rule, and theirs has none: it is ours, within
as many frames; the first nine are all remembered."""
FOUR_STEPS = (1000.0, 750.0, 500.0, 250.0)


@dataclass(frozen=True, kw_only=True)
class PublishedStudent:
    """A published student."""

    published: str
    """Hugging Face repository and file."""
    card: StudentCard
    weights: str = "generator_ema"
    """Which of two sets its authors run; files often hold one only."""
    hints: tuple[str, ...] = ()
    """Parts of the path that suggest it. They are told to the user and decide nothing."""
    differs: str = ""
    """What its own code does and ours does not."""


def _card(name: str, memory: MemoryConfig = LONGER, **fields) -> StudentCard:
    return StudentCard(name=name, stage="published", memory=memory, **fields)


FRAMEWISE = dataclasses.replace(LONGER, chunk=1)
BASE = "wan2.1-base"

PUBLISHED: Mapping[str, PublishedStudent] = {
    "self-forcing": PublishedStudent(
        published="gdhe17/Self-Forcing: checkpoints/self_forcing_dmd.pt; wlsaidhi/SFWan2.1-T2V-1.3B-Diffusers",
        card=_card("self-forcing"), hints=("self_forcing", "self-forcing", "sfwan"),
    ),
    "causal-forcing": PublishedStudent(
        published="zhuhz22/Causal-Forcing: chunkwise/causal_forcing.pt", card=_card("causal-forcing"),
        weights="generator", hints=("causal_forcing", "causal-forcing"),
    ),
    "causal-forcing-framewise": PublishedStudent(
        published="zhuhz22/Causal-Forcing: framewise/causal_forcing.pt",
        card=_card("causal-forcing-framewise", FRAMEWISE), hints=("framewise",),
    ),
    "causal-forcing-2step": PublishedStudent(
        published="zhuhz22/Causal-Forcing: causal-forcing++/framewise-2step.pt",
        card=_card("causal-forcing-2step", FRAMEWISE, steps=(1000.0, 500.0), first_steps=FOUR_STEPS),
        hints=("2step",),
    ),
    "causal-forcing-1step": PublishedStudent(
        published="zhuhz22/Causal-Forcing: causal-forcing++/framewise-1step.pt",
        card=_card("causal-forcing-1step", FRAMEWISE, steps=(1000.0,), first_steps=FOUR_STEPS), hints=("1step",),
    ),
    "longlive": PublishedStudent(
        published="Efficient-Large-Model/LongLive-1.3B: models/longlive_base.pt, with models/lora.pt",
        card=_card("longlive", MEMORY_PRESETS["longlive"]), weights="generator", hints=("longlive",),
        differs="positions are ranks in the memory, not absolute",
    ),
    "infinite-forcing": PublishedStudent(
        published="SOTAMak1r/Infinite-Forcing: ema_model.pt",
        card=_card("infinite-forcing", MEMORY_PRESETS["infinity-rope"]), hints=("infinite", "infinity"),
    ),
    "reward-forcing": PublishedStudent(
        published="daydreamlive/Reward-Forcing-T2V-1.3B: rewardforcing.pt",
        card=_card("reward-forcing", MemoryConfig(slow=0, fast=6, window=9, policy="fifo")), hints=("reward",),
        differs="the sink stays as it is; theirs takes in a thousandth of what leaves",
    ),
    "memflow": PublishedStudent(
        published="daydreamlive/MemFlow: base.pt, with lora.pt",
        card=_card("memflow", MemoryConfig(slow=3, fast=9, window=15, policy="uniform", uniform_stride=9)),
        weights="generator", hints=("memflow",),
        differs="slow memory keeps the latest of every third chunk; theirs those that the prompt asks for",
    ),
    "krea-14b": PublishedStudent(
        published="krea/krea-realtime-video: krea-realtime-video-14b.safetensors",
        card=_card("krea-14b", MemoryConfig(sink=0, slow=0, fast=6, window=6, policy="fifo"), base="wan2.1-14b"),
        hints=("krea",), differs="remembered frames are not encoded anew for every chunk",
    ),
    "context-forcing": PublishedStudent(
        published="ShuoChen20/context_forcing: model.pt",
        card=_card("context-forcing", MEMORY_PRESETS["released"]), hints=("context_forcing", "context-forcing"),
    ),
    BASE: PublishedStudent(
        published="Wan-AI/Wan2.1-T2V-1.3B, -14B, and their Diffusers and ComfyUI editions",
        card=StudentCard(
            name=BASE, stage="bidirectional", steps=tuple(float(step) for step in range(1000, 0, -20)), shift=8.0,
            solver="euler", memory=LONGER,
        ),
        hints=("wan2.1", "wan2_1"), differs="no causal student: made chunk by chunk, its videos fall apart",
    ),
}  # fmt: skip
"""By name: what `--card` takes."""
DEFAULT = "self-forcing"
CARDS = ("auto", *PUBLISHED)


@dataclass(frozen=True, kw_only=True)
class CardChoice:
    """The card a file gets."""

    card: StudentCard
    reason: str
    note: str = ""
    """What the user should know before trusting it; empty where the file says it all."""


def published_student(name: str) -> PublishedStudent:
    """A published student by name. Raises ValueError for an unknown one."""
    if name not in PUBLISHED:
        raise ValueError(f"card: {name!r} is not one of {', '.join(CARDS)}")
    return PUBLISHED[name]


def card_in(metadata: Mapping[str, str], path: str | Path) -> StudentCard | None:
    """The card in a file's metadata, None where there is none. Raises ValueError for one that is not understood."""
    if CARD_KEY not in metadata:
        return None
    try:
        return StudentCard.from_json(metadata[CARD_KEY])
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def choose_card(container: Container, taken: str, name: str, config: WanConfig) -> CardChoice:
    """The card of weights `taken` from a container without one; `name` is a published student, or `auto`.

    Raises ValueError for bidirectional weights that were not asked for by name.
    """
    path = container.path
    if name != "auto":
        found = published_student(name)
        note = f"{path}: taken as {name}; here {found.differs}" if found.differs else ""
        return CardChoice(card=_sized(found.card, config), reason=f"asked for: {name}", note=note)
    if container.scheduler == "SelfForcingFlowMatchScheduler":
        return CardChoice(
            card=_sized(PUBLISHED["self-forcing"].card, config), reason=f"its scheduler is {container.scheduler}"
        )
    architecture = str(container.config.get("_class_name", ""))
    if architecture in ("WanModel", "WanTransformer3DModel"):
        causal = ", ".join(name for name in PUBLISHED if name != BASE)
        raise ValueError(
            f"{path}: its config.json says {architecture}: plain Wan 2.1, which sees all frames at once, no causal"
            f" student; if it is one, say which (card: {causal}); to load it all the same, card: {BASE}"
        )
    card = PUBLISHED[DEFAULT].card
    steps = " ".join(f"{step:g}" for step in card.steps)
    is_causal = taken.startswith("generator") or architecture.startswith("Causal") or _says_causal(container.metadata)
    note = (
        f"{path}: the file does not say how it was trained{'' if is_causal else ', nor that it is a causal student'};"
        f" taken as {DEFAULT}: steps {steps}, shift {card.shift:g}, chunk {card.memory.chunk}, window"
        f" {card.memory.window}.{_hint(path)} Choose with card: {', '.join(PUBLISHED)}"
    )
    return CardChoice(card=_sized(card, config), reason=f"nothing in it says how it was trained: {DEFAULT}", note=note)


def _says_causal(metadata: Mapping[str, str]) -> bool:
    """Whether ComfyUI's `config` metadata does."""
    try:
        return json.loads(metadata.get("config", "{}")).get("transformer", {}).get("causal_ar") is True
    except (ValueError, AttributeError, RecursionError):
        return False


def _hint(path: Path) -> str:
    """What the file's name and its folder's suggest; a kind before its family."""
    told = "/".join(path.absolute().parts[-2:]).lower()
    kinds = ("causal-forcing-1step", "causal-forcing-2step", "causal-forcing-framewise")
    found = [name for name in (*kinds, *PUBLISHED) if any(hint in told for hint in PUBLISHED[name].hints)]
    return f" Its name suggests {found[0]}." if found else ""


def _sized(card: StudentCard, config: WanConfig) -> StudentCard:
    """A known card on the base that the weights really have."""
    return dataclasses.replace(card, base=published_size(config) or "wan2.1")


def override(card: StudentCard, overrides: Sequence[str]) -> StudentCard:
    """A card with fields replaced: `steps=1000,500`, `shift=3`, `memory.slow=0`; a memory's field may stand alone.

    Raises ValueError for an unknown field or an impossible value.
    """
    inner = {f.name for f in dataclasses.fields(MemoryConfig)} - {f.name for f in dataclasses.fields(card)}
    overrides = [f"memory.{text}" if text.partition("=")[0] in inner else text for text in overrides]
    try:
        return with_settings(card, parse_overrides(overrides))
    except ValueError as error:
        raise ValueError(f"set: {error}") from None
