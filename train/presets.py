"""Named settings of every stage, YAML files, and overrides `key=value`. Unknown keys are errors."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..memory.config import MemoryConfig
from ..memory.fields import quoted
from ..model.codecs.backbone import WAN
from ..model.settings import parse_overrides, read_settings, with_settings
from .config import ExportConfig, LoopConfig, OptimConfig, field_defaults, plain
from .parallel import start_parallel
from .stage import Stage
from .stages.anchor import AnchorConfig
from .stages.codec import VaeConfig, VaeStage
from .stages.distill import DistillConfig, DistillStage
from .stages.pretrain import PretrainConfig, PretrainStage
from .stages.teacher import TeacherConfig, TeacherStage

STAGES: dict[str, type[Stage]] = {
    "vae": VaeStage,
    "pretrain": PretrainStage,
    "teacher": TeacherStage,
    "local": DistillStage,
    "contextual": DistillStage,
}
Settings = dict[str, Any]
StageConfig = LoopConfig | ExportConfig

DEMO: Settings = dict(
    preset="demo", data="demo", size=(128, 64), memory=MemoryConfig(), shift=3.0, precision="fp32", recompute=False,
    batch=4,
)  # fmt: skip
SMOKE: Settings = DEMO | dict(steps=4, batch=2, checkpoint_every=2, sample_every=4)
NO_CONTEXT: Settings = dict(context_from=0, context_to=0, local_every=0)
DEMO_DISTILL: Settings = DEMO | dict(
    guidance=0.0, score_chunks=1, critic_per_student=2, sample_chunks=24, teacher="runs/teacher/teacher.safetensors",
    critic_optim=OptimConfig(lr=4e-4, betas=(0.0, 0.95), clip=1.0), first_exit_share=0.5, long_trips=0.4,
    recall_weight=3.0, normaliser="fast", share_rollouts=True, gate_every=20,
    anchor=AnchorConfig(weight=2.0, recall_weight=10.0, long_trips=0.4),
)  # fmt: skip
SMOKE_DISTILL: Settings = SMOKE | dict(target_from=1, target_chunks=2, critic_per_student=2, sample_chunks=2)
WAN_TEACHER = "wan2.1_t2v_1.3B.safetensors"

CONFIGS: dict[str, dict[str, StageConfig]] = {
    "vae": {
        "demo": VaeConfig(steps=900, batch=32, decay=0.4, checkpoint_every=250, sample_every=250),
        "smoke": VaeConfig(
            width=16, num_blocks=1, steps=4, batch=2, checkpoint_every=2, sample_every=4, out="runs/smoke-vae"
        ),
    },
    "pretrain": {
        "wan2.1-1.3b": PretrainConfig(
            data="data/clips", init=WAN_TEACHER, steps=5000, batch=16, openings=16, clips_per_pass=1, sample_steps=50,
            optim=OptimConfig(lr=1e-5, betas=(0.9, 0.999), clip=1.0, ema=0.999),
        ),
        "demo": PretrainConfig(
            **DEMO, steps=4000, warmup=50, decay=0.4, checkpoint_every=100, sample_every=100
        ),
        "smoke": PretrainConfig(**SMOKE, openings=2, num_chunks=4, out="runs/smoke-pretrain"),
    },
    "teacher": {
        "wan2.1-1.3b": TeacherConfig(data="data/clips", init=WAN_TEACHER, steps=8000, batch=8),
        # The pretrained student continues a video chunk by chunk; this run adds contexts with errors.
        "demo": TeacherConfig(
            **DEMO, init="runs/pretrain/student.safetensors", num_chunks=18, target_chunks=1, steps=300, decay=0.8,
            text_dropout=0.0, optim=OptimConfig(kind="muon", lr=5e-4, betas=(0.9, 0.98), clip=1.0, ema=0.99),
        ),
        "smoke": TeacherConfig(**SMOKE, num_chunks=4, target_chunks=2, out="runs/smoke-teacher"),
    },
    "local": {
        "wan2.1-1.3b": DistillConfig(
            **NO_CONTEXT, data="data/prompts", student="causal_init.safetensors", teacher=WAN_TEACHER, target_from=1,
            out="runs/local", negative_prompt=WAN.negative_prompt,
        ),
        "demo": DistillConfig(
            **DEMO_DISTILL, **NO_CONTEXT, student="runs/pretrain/student.safetensors", target_from=1, target_chunks=4,
            student_optim=OptimConfig(lr=1e-4, betas=(0.0, 0.95), clip=1.0, ema=0.95), steps=160, decay=0.5,
            out="runs/local",
        ),
        "smoke": DistillConfig(**SMOKE_DISTILL, **NO_CONTEXT, guidance=0.0, out="runs/smoke-local"),
    },
    "contextual": {
        "wan2.1-1.3b": DistillConfig(
            data="data/prompts", student="runs/local/student.safetensors", steps=500,
            teacher="runs/teacher/teacher.safetensors", negative_prompt=WAN.negative_prompt,
        ),
        # A lower learning rate than in `local`: with a higher one the student stops recalling from memory.
        "demo": DistillConfig(
            **DEMO_DISTILL, student="runs/local/student.safetensors", target_from=4, target_chunks=4, context_from=3,
            context_to=24, context_ramp=20, steps=80, decay=0.5,
            # 40 updates of the student: an average from the first on would be 30 % start weights.
            student_optim=OptimConfig(lr=4e-5, betas=(0.0, 0.95), clip=1.0, ema=0.9, ema_from=10),
        ),
        "smoke": DistillConfig(
            **SMOKE_DISTILL, context_from=1, context_to=3, context_ramp=2, local_every=2, out="runs/smoke-contextual"
        ),
    },
    "export": {"demo": ExportConfig(run="runs/contextual")},
}  # fmt: skip


def load_config(stage: str, name: str, overrides: Sequence[str] = ()) -> StageConfig:
    """The settings of a run: named ones, or a YAML file with `config: NAME` and the settings that differ.

    Raises ValueError for an unknown stage, name or key, or a value of another type.
    """
    if stage not in CONFIGS:
        raise ValueError(f"stage: {quoted(stage)} is not one of {', '.join(CONFIGS)}")
    settings, path, raw = parse_overrides(overrides), None, {}
    if name.endswith((".yaml", ".yml")):
        path = Path(name)
        name, raw = read_settings(path, list(CONFIGS[stage]))
    where = f"{path}: " if path else ""
    if name not in CONFIGS[stage]:
        raise ValueError(f"{where}config: {quoted(name)} is not one of {', '.join(CONFIGS[stage])} (stage {stage})")
    try:
        config = with_settings(CONFIGS[stage][name], raw)
    except ValueError as error:
        raise ValueError(f"{where}{error}") from None
    return with_settings(config, settings)


def config_from_json(stage: str, raw: dict) -> StageConfig:
    """The settings that a checkpoint's `run.json` contains; those that are newer have their defaults."""
    config = next(iter(CONFIGS[stage].values()))
    return with_settings(config, plain(field_defaults(config)) | raw)


def build_stage(stage: str, settings: Any) -> Stage:
    """A stage with its settings, on the device and among the processes of this run."""
    return STAGES[stage](settings, start_parallel(settings.device, settings.sequence))
