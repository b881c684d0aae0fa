"""Named runs: one dataclass a stage, one function a run. Overrides are `key=value`; unknown keys are errors."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ..memory.config import CLEAN_POLICIES, MEMORY_PRESETS, MemoryConfig
from ..model.config import PRESETS
from ..model.settings import parse_overrides, read_settings, with_settings
from ..model.units import PIXELS_PER_LATENT
from .lora import LoraConfig
from .parallel import PRECISIONS
from .stages.recycling import RecyclingConfig
from .trained_network import OptimConfig


@dataclass(frozen=True, kw_only=True)
class LoopConfig(ABC):
    """What the loop reads, whatever the stage (train/loop.py)."""

    steps: int = 600
    batch: int = 64
    """Samples of an iteration, over all processes; each makes its own one after the other."""
    warmup: int = 0
    """Steps in which the learning rate rises."""
    decay: float = 0.0
    """The last part of the steps in which the learning rate falls to zero; 0: it stays."""
    device: str = "auto"
    data_seed: int = 1
    seed: int = 0
    max_skipped: int = 10
    """Iterations in a row whose gradients may be dropped before the run stops."""
    checkpoint_every: int = 50
    sample_every: int = 50
    out: str = ""

    def __post_init__(self):
        _check_positive(self, "steps", "batch", "checkpoint_every", "sample_every")
        for name in ("seed", "data_seed"):
            if not 0 <= getattr(self, name) < 2**31:
                raise ValueError(f"{name}: {getattr(self, name)} must be from 0 to {2**31 - 1}")
        if not 0 <= self.decay <= 1:
            raise ValueError(f"decay: {self.decay} is a share of the steps, from 0 to 1")

    @property
    @abstractmethod
    def learners(self) -> dict[str, OptimConfig]:
        """The networks that learn, and how."""


@dataclass(frozen=True, kw_only=True)
class VaeConfig(LoopConfig):
    """Stage `vae`: the demo codec's statistics and its decoder."""

    width: int = 96
    num_blocks: int = 3
    latent_noise: float = 0.05
    """Standard deviation of noise on the latents, so that a student's small errors are drawn over."""
    optim: OptimConfig = field(default_factory=lambda: OptimConfig(lr=2e-3, betas=(0.9, 0.999)))
    out: str = "runs/vae"

    def __post_init__(self):
        super().__post_init__()
        _check_positive(self, "width", "num_blocks")

    @property
    def learners(self) -> dict[str, OptimConfig]:
        return {"codec": self.optim}


@dataclass(frozen=True, kw_only=True)
class NetworkConfig(LoopConfig):
    """What every stage has that trains a network in Wan's layout."""

    preset: str = "wan2.1-1.3b"
    memory: MemoryConfig = field(default_factory=lambda: MEMORY_PRESETS["context-forcing"])
    data: str = ""
    """`demo` for the demo world, or a folder made by `context-forcing encode`."""
    codec: str = "assets"
    """What the demo world's clips are encoded and sample pictures drawn with: `assets` for the shipped demo codec, or
    the path of a codec file."""
    size: tuple[int, int] = (832, 480)
    """Width and height of the videos in pixels."""
    shift: float = 5.0
    lora: LoraConfig = field(default_factory=LoraConfig)
    """Adapters for every network of the stage that learns."""
    precision: str = "bf16"
    recompute: bool = True
    """Keep only block inputs for the backward pass, compute the rest again."""

    def __post_init__(self):
        super().__post_init__()
        _check_positive(self, "shift")
        _check_choice(self, "preset", PRESETS)
        _check_choice(self, "precision", PRECISIONS)
        if self.memory.policy not in CLEAN_POLICIES:
            raise ValueError(
                f"memory.policy: {self.memory.policy} is for weights that were released; train with one of"
                f" {', '.join(CLEAN_POLICIES)}"
            )
        if not self.data:
            raise ValueError("data: say demo, or the folder of a set made by `context-forcing encode`")
        if len(self.size) != 2 or any(side <= 0 or side % 16 for side in self.size):
            raise ValueError(f"size: {self.size} must be a width and a height, multiples of 16")

    @property
    def codec_path(self) -> str | None:
        """The demo codec's file; None is the shipped one."""
        return None if self.codec == "assets" else self.codec

    @property
    def latent_size(self) -> tuple[int, int, int]:
        """C, H, W of a latent frame."""
        return PRESETS[self.preset].channels, self.size[1] // PIXELS_PER_LATENT, self.size[0] // PIXELS_PER_LATENT

    @property
    def frame_tokens(self) -> int:
        """Tokens of a latent frame."""
        _, patch_rows, patch_columns = PRESETS[self.preset].patch_size
        return self.latent_size[1] // patch_rows * (self.latent_size[2] // patch_columns)


@dataclass(frozen=True, kw_only=True)
class PretrainConfig(NetworkConfig):
    """Stage `pretrain`: teacher-forced flow matching over the Slow-Fast layout, on the demo world (demo_world.md 3)."""

    init: str = ""
    """A student file to start from; empty starts from fresh weights."""
    num_chunks: int = 12
    sample_steps: int = 8
    """Denoising steps written on the card."""
    context_noise: float = 0.3
    """Most noise on a remembered frame, labelled clean: what keeps long rollouts from drifting."""
    context_noise_share: float = 0.7
    recall_weight: float = 5.0
    """How much more a column counts that only sink or slow frames can tell."""
    unseen_weight: float = 2.0
    """How much more a column counts that nothing remembered can tell: it has to be made up, and whole."""
    pacing: float = 0.5
    """Share of clips whose camera goes back and forth: there is more to look up in them."""
    openings: int = 24
    """Clips of a single chunk beside the `batch` long ones: a video has to begin somewhere."""
    text_dropout: float = 0.05
    optim: OptimConfig = field(default_factory=lambda: OptimConfig(kind="muon", lr=2e-3, betas=(0.9, 0.98), clip=1.0))
    out: str = "runs/pretrain"

    def __post_init__(self):
        super().__post_init__()
        _check_positive(self, "num_chunks", "sample_steps", "recall_weight", "unseen_weight")
        if self.data != "demo":
            raise ValueError(f"data: {self.data!r}; this stage knows the demo world only")

    @property
    def learners(self) -> dict[str, OptimConfig]:
        return {"student": self.optim}


@dataclass(frozen=True, kw_only=True)
class TeacherConfig(NetworkConfig):
    """Stage `teacher`: a context teacher (method.md 5.2)."""

    init: str = ""
    """The network to start from: a bidirectional or a causal one in Wan's layout; empty starts from fresh weights."""
    num_chunks: int = 27
    """Length of a clip, in chunks."""
    target_chunks: int = 7
    plain_share: float = 0.1
    """Iterations without a context, so that plain generation is not forgotten."""
    text_dropout: float = 0.1
    recycling: RecyclingConfig = field(default_factory=RecyclingConfig)
    optim: OptimConfig = field(default_factory=lambda: OptimConfig(lr=1e-5, betas=(0.9, 0.999), clip=1.0, ema=0.999))
    out: str = "runs/teacher"

    def __post_init__(self):
        super().__post_init__()
        if not 0 < self.target_chunks < self.num_chunks:
            raise ValueError(
                f"target_chunks: {self.target_chunks} must be above 0 and below num_chunks {self.num_chunks}"
            )

    @property
    def learners(self) -> dict[str, OptimConfig]:
        return {"teacher": self.optim}


TEACHER_SEES = ("memory", "recent", "nothing")


@dataclass(frozen=True, kw_only=True)
class DistillConfig(NetworkConfig):
    """Stages `local` and `contextual` (method.md 5.3, 5.4)."""

    student: str = ""
    """The student to start from."""
    teacher: str = ""
    """The frozen teacher; the critic starts from it."""
    teacher_sees: str = "memory"
    """What teacher and critic are given: `memory` all that the student remembers; `recent` the fast frames alone, a
    short-window teacher as LongLive's; `nothing`: they judge the target by itself."""
    denoising_steps: tuple[float, ...] = (1000.0, 750.0, 500.0, 250.0)
    """The student's steps, before the warp."""
    target_from: int = 7
    """Chunks of the shortest target."""
    target_chunks: int = 7
    """Chunks of the longest target."""
    score_chunks: int = 0
    """Chunks of the target that are scored together, each such piece given what is remembered when it begins; 0: all
    of it, given what was remembered when the target began. 1 is for teachers that continue a video chunk by chunk."""
    context_from: int = 7
    """Chunks of the longest context at the first iteration; 0: none ever, with context_to 0."""
    context_to: int = 33
    """Chunks of the longest context once it has grown."""
    context_ramp: int = 300
    """Iterations in which it grows."""
    local_every: int = 5
    """Every so many rounds of critic and student one has no context; 0: none."""
    critic_per_student: int = 5
    guidance: float = 3.0
    """w of teacher + w (teacher - teacher without text); 0: no guidance."""
    student_optim: OptimConfig = field(default_factory=lambda: OptimConfig(lr=2e-6, ema=0.99, ema_from=20))
    critic_optim: OptimConfig = field(default_factory=lambda: OptimConfig(lr=4e-7))
    sample_chunks: int = 28
    """Length of the sample pictures' rollout."""
    out: str = "runs/contextual"

    def __post_init__(self):
        super().__post_init__()
        _check_positive(self, "target_from", "critic_per_student", "sample_chunks")
        _check_choice(self, "teacher_sees", TEACHER_SEES)
        if not 0 <= self.score_chunks <= self.target_chunks:
            raise ValueError(f"score_chunks: {self.score_chunks} must be from 0 to target_chunks {self.target_chunks}")
        if self.target_from > self.target_chunks:
            raise ValueError(f"target_from: {self.target_from} is above target_chunks {self.target_chunks}")
        if not 0 <= self.context_from <= self.context_to:
            raise ValueError(f"context_from: {self.context_from} must be from 0 to context_to {self.context_to}")

    @property
    def learners(self) -> dict[str, OptimConfig]:
        return {"student": self.student_optim, "critic": self.critic_optim}

    @property
    def stage_name(self) -> str:
        """What the card says: `local` without any context, else `contextual`."""
        return "contextual" if self.context_to else "local"


@dataclass(frozen=True, kw_only=True)
class ExportConfig:
    """Stage `export`: a file from a run's newest checkpoint. Every checkpoint writes one into the run's own folder;
    this is for one elsewhere, or after the file was lost."""

    run: str = ""
    """The folder of a run of `pretrain`, `teacher`, `local` or `contextual`."""
    out: str = "export"

    def __post_init__(self):
        if not self.run:
            raise ValueError("run: give the folder of a run, for example run=runs/contextual")


def vae_demo() -> VaeConfig:
    return VaeConfig(steps=900, batch=32, decay=0.4, checkpoint_every=250, sample_every=250)


def vae_smoke() -> VaeConfig:
    return VaeConfig(width=16, num_blocks=1, steps=4, batch=2, checkpoint_every=2, sample_every=4, out="runs/smoke-vae")


def pretrain_demo() -> PretrainConfig:
    return PretrainConfig(**DEMO, steps=4000, warmup=50, decay=0.4, checkpoint_every=100, sample_every=100)


def pretrain_smoke() -> PretrainConfig:
    return PretrainConfig(**SMOKE, openings=2, num_chunks=4, out="runs/smoke-pretrain")


DEMO = dict(
    preset="demo", data="demo", size=(128, 64), memory=MemoryConfig(), shift=3.0, precision="fp32", recompute=False,
    batch=4,
)  # fmt: skip
"""What the demo world's runs share."""


def teacher_wan() -> TeacherConfig:
    return TeacherConfig(data="data/clips", init="wan2.1_t2v_1.3B.safetensors", steps=8000, batch=8)


def teacher_demo() -> TeacherConfig:
    """From the teacher-forced student, which continues a video from memory already, a chunk at a time; here it meets
    contexts with errors in them."""
    return TeacherConfig(
        **DEMO, init="runs/pretrain/student.safetensors", num_chunks=18, target_chunks=1, steps=300, decay=0.8,
        text_dropout=0.0, optim=OptimConfig(kind="muon", lr=5e-4, betas=(0.9, 0.98), clip=1.0, ema=0.99),
    )  # fmt: skip


def local_wan() -> DistillConfig:
    return DistillConfig(
        data="data/prompts", student="causal_init.safetensors",
        teacher="wan2.1_t2v_1.3B.safetensors", target_from=1, context_from=0, context_to=0, local_every=0,
        out="runs/local",
    )  # fmt: skip


def contextual_wan() -> DistillConfig:
    return DistillConfig(
        data="data/prompts", student="runs/local/student.safetensors", teacher="runs/teacher/teacher.safetensors",
        steps=500,
    )  # fmt: skip


DEMO_DISTILL = dict(
    guidance=0.0, score_chunks=1, critic_per_student=2, sample_chunks=24, teacher="runs/teacher/teacher.safetensors",
    student_optim=OptimConfig(lr=1e-4, betas=(0.0, 0.95), clip=1.0, ema=0.95),
    critic_optim=OptimConfig(lr=4e-4, betas=(0.0, 0.95), clip=1.0),
)  # fmt: skip


def local_demo() -> DistillConfig:
    return DistillConfig(
        **DEMO, **DEMO_DISTILL, student="runs/pretrain/student.safetensors", target_from=1,
        target_chunks=4, context_from=0, context_to=0, local_every=0, steps=160, decay=0.5, out="runs/local",
    )  # fmt: skip


def contextual_demo() -> DistillConfig:
    """Slower than `local`: what a student looks up wears off under updates as large as those that sharpen it."""
    return DistillConfig(
        **DEMO, **DEMO_DISTILL | dict(student_optim=OptimConfig(lr=4e-5, betas=(0.0, 0.95), clip=1.0, ema=0.97)),
        student="runs/local/student.safetensors", target_from=4, target_chunks=4, context_from=3, context_to=16,
        context_ramp=20, steps=80, decay=0.5,
    )  # fmt: skip


SMOKE = DEMO | dict(steps=4, batch=2, checkpoint_every=2, sample_every=4)


def teacher_smoke() -> TeacherConfig:
    return TeacherConfig(**SMOKE, num_chunks=4, target_chunks=2, out="runs/smoke-teacher")


def local_smoke() -> DistillConfig:
    return DistillConfig(
        **SMOKE, target_from=1, target_chunks=2, context_from=0, context_to=0, local_every=0,
        guidance=0.0, critic_per_student=2, sample_chunks=2, out="runs/smoke-local",
    )  # fmt: skip


def contextual_smoke() -> DistillConfig:
    return DistillConfig(
        **SMOKE, target_from=1, target_chunks=2, context_from=1, context_to=3, context_ramp=2, local_every=2,
        critic_per_student=2, sample_chunks=2, out="runs/smoke-contextual",
    )  # fmt: skip


def export_demo() -> ExportConfig:
    return ExportConfig(run="runs/contextual")


CONFIGS: dict[str, dict[str, Callable]] = {
    "vae": {"demo": vae_demo, "smoke": vae_smoke},
    "pretrain": {"demo": pretrain_demo, "smoke": pretrain_smoke},
    "teacher": {"wan2.1-1.3b": teacher_wan, "demo": teacher_demo, "smoke": teacher_smoke},
    "local": {"wan2.1-1.3b": local_wan, "demo": local_demo, "smoke": local_smoke},
    "contextual": {"wan2.1-1.3b": contextual_wan, "demo": contextual_demo, "smoke": contextual_smoke},
    "export": {"demo": export_demo},
}


def load_config(stage: str, name: str, overrides: Sequence[str] = ()):
    """The configuration of a run: a named one, or a YAML file that says `config: NAME` and what is otherwise in it.

    Raises ValueError for an unknown stage, name or key, or a value of another type.
    """
    if stage not in CONFIGS:
        raise ValueError(f"stage: {stage!r} is not one of {', '.join(CONFIGS)}")
    settings = parse_overrides(overrides)
    if name.endswith((".yaml", ".yml")):
        path = Path(name)
        name, raw = read_settings(path, list(CONFIGS[stage]))
        try:
            base = with_settings(load_config(stage, name), raw)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None
    elif name in CONFIGS[stage]:
        base = CONFIGS[stage][name]()
    else:
        raise ValueError(f"config: {name!r} is not one of {', '.join(CONFIGS[stage])} (stage {stage})")
    return with_settings(base, settings)


def from_plain(stage: str, raw: dict):
    """The configuration that `dataclasses.asdict` and JSON made plain values of."""
    return with_settings(next(iter(CONFIGS[stage].values()))(), raw)


def _check_choice(config, name: str, choices) -> None:
    if getattr(config, name) not in choices:
        raise ValueError(f"{name}: {getattr(config, name)!r} is not one of {', '.join(choices)}")


def _check_positive(config, *names: str) -> None:
    for name in names:
        if not getattr(config, name) > 0:
            raise ValueError(f"{name}: {getattr(config, name)} must be above 0")
