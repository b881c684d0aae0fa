"""Stages `local` and `contextual`: distribution matching on rollouts of the student (docs/method.md, Distillation).

The student generates a context, then a target with gradients. The frozen teacher and the trained critic predict x0 of
the noised target given the same remembered frames. The difference is the direction of the student's update.
"""

import dataclasses
from dataclasses import dataclass, field, fields

import torch
from PIL import Image
from torch import Tensor

from ...memory.memory import Memory, empty_memory
from ...memory.view import ATTENDS
from ...model.codecs.backbone import backbone_of
from ...model.codecs.demo_vae import load_demo_codec
from ...model.config import PRESETS, StudentCard
from ...model.flow import add_noise, shift_sigma, warped_sigmas, x0_from_flow
from ...model.network import Network
from ...model.sampler import seeded_generator, seeded_noise
from ...video.frames import film_strip
from ..config import NetworkConfig, OptimConfig, check_choice, check_range
from ..data.clips import DemoPrompts, ShownBy, open_prompts
from ..parallel import ParallelState
from ..stage import Stage
from .anchor import Anchor, AnchorConfig
from .gate import GATE_CLIPS, RecallGate
from .score import flow_given_context
from .student import Piece, Rollout, Student

MIN_SIGMA, MAX_SIGMA = 0.02, 0.98
"""Range of noise levels of a scored target."""
Loss = tuple[Tensor, dict[str, float]]
"""A loss and metrics."""


TEACHER_SEES = ("memory", "recent", "nothing")
NORMALISERS = ("all", "fast")
DEMO_ONLY = ("recall_weight", "normaliser", "pacing", "long_trips")
"""Settings that need true camera moves."""


@dataclass(frozen=True, kw_only=True)
class DistillConfig(NetworkConfig):
    """Stages `local` and `contextual` (docs/method.md, Distillation)."""

    student: str = ""
    """The student file to start from."""
    teacher: str = ""
    """The frozen teacher's file. The critic starts from it too."""
    teacher_preset: str = ""
    """Sizes of teacher and critic, if they are not those of the student."""
    teacher_sees: str = "memory"
    """What teacher and critic get of the context: `memory`, all that the student remembers; `recent`, the fast frames
    only, as a short-window teacher (LongLive); `nothing`."""
    commit_attends: str = "all"
    """What the commit pass attends to in the student's rollouts (view.ATTENDS); the student's card says the same."""
    denoising_steps: tuple[float, ...] = (1000.0, 750.0, 500.0, 250.0)
    """The student's steps, before the shift."""
    target_from: int = 7
    """Chunks of the shortest target."""
    target_chunks: int = 7
    """Chunks of the longest target."""
    score_chunks: int = 0
    """Chunks of the target that are scored together, given what the student remembered when they began; 0 scores the
    whole target together. 1 is for teachers that continue a video chunk by chunk."""
    context_from: int = 7
    """Chunks of the longest context at the first iteration. 0, with context_to 0, is a run without contexts."""
    context_to: int = 33
    """Chunks of the longest context after `context_ramp` iterations."""
    context_ramp: int = 300
    """Number of iterations in which the longest context grows."""
    local_every: int = 5
    """One in this many rounds of critic and student updates has no context; 0 for none."""
    first_exit_share: float = 0.0
    """Share of rollouts whose exit step is the first, which decides what the picture shows; the others are equally
    likely. 0 makes all steps equally likely."""
    critic_per_student: int = 5
    share_rollouts: bool = False
    """In an iteration of the student, the critic learns from the student's rollouts and gets none of its own. The
    student's scores come before that, so the critic has not seen what it scores."""
    guidance: float = 3.0
    """w of teacher + w (teacher - teacher under `negative_prompt`); 0 is no guidance."""
    negative_prompt: str = ""
    """The prompt of the teacher's other pass for guidance. A text that is not empty must be in the encoded set."""
    recall_weight: float = 1.0
    """Demo world: factor of the student's gradient in columns that only sink or slow frames show."""
    normaliser: str = "all"
    """Columns whose mean |x - teacher| divides the student's gradient. `all`; or `fast`, those that fast frames show
    (demo world), so that a column that is not as remembered does not make its own gradient smaller."""
    pacing: float = 0.3
    """Demo world: share of prompts whose camera moves back and forth."""
    long_trips: float = 0.0
    """Demo world: share of prompts whose camera goes straight out by up to 30 columns and back."""
    anchor: AnchorConfig = field(default_factory=AnchorConfig)
    """The loss of pretraining on true clips, beside that of the scores. It needs videos, not prompts only."""
    gate_every: int = 0
    """Number of iterations between two measurements of the student's recall on true clips; 0 for none."""
    gate_limit: float = 1.25
    """The run ends when the error of recall is more than so many times that of the student it began with. The exported
    weights are then those of the measurement before."""
    student_optim: OptimConfig = field(default_factory=lambda: OptimConfig(lr=2e-6, ema=0.99, ema_from=20))
    critic_optim: OptimConfig = field(default_factory=lambda: OptimConfig(lr=4e-7))
    sample_chunks: int = 28
    """Chunks of the rollout of the sample images."""
    out: str = "runs/contextual"

    def __post_init__(self):
        super().__post_init__()
        if self.memory.recalls:
            raise ValueError("memory.policy: recall is not known to rollouts in training; train with novel")
        check_range(self, "target_from", "critic_per_student", "sample_chunks", above=0)
        check_choice(self, "teacher_sees", TEACHER_SEES)
        check_choice(self, "commit_attends", ATTENDS)
        check_choice(self, "teacher_preset", ("", *PRESETS))
        self.check_sequence(self.scored_by)
        if backbone_of(self.scored_by) is not backbone_of(self.preset):
            raise ValueError(
                f"teacher_preset: {self.scored_by} and preset {self.preset} have different latents and texts; give two"
                " sizes of Wan 2.1"
            )
        check_range(self, "score_chunks", least=0, most=self.target_chunks)
        check_range(self, "target_from", most=self.target_chunks)
        check_range(self, "context_from", least=0, most=self.context_to)
        check_range(self, "first_exit_share", "pacing", "long_trips", least=0, most=1)
        check_range(self, "gate_every", least=0)
        check_range(self, "recall_weight", "gate_limit", above=0)
        check_choice(self, "normaliser", NORMALISERS)
        if self.data != "demo":
            self._check_not_demo()

    def _check_not_demo(self) -> None:
        defaults = {f.name: f.default for f in fields(self) if f.name in DEMO_ONLY}
        changed = {name: getattr(self, name) for name in DEMO_ONLY if getattr(self, name) != defaults[name]}
        for name, value in changed.items():
            raise ValueError(
                f"{name}: {value} needs the true camera moves of data=demo; with {self.data} give {defaults[name]}"
            )

    @property
    def scored_by(self) -> str:
        """The preset of teacher and critic."""
        return self.teacher_preset or self.preset

    def longest_context(self, step: int) -> int:
        """Chunks of the longest context of an iteration.

        It grows from `context_from` to `context_to` over `context_ramp` iterations. Every `local_every`-th round has no
        context, to keep the quality of short videos.
        """
        round_number = step // self.critic_per_student
        if self.local_every and (round_number + 1) % self.local_every == 0:
            return 0
        ramp = min(1.0, step / self.context_ramp) if self.context_ramp else 1.0
        return self.context_from + round((self.context_to - self.context_from) * ramp)


class DistillStage(Stage):
    """Student, critic, frozen teacher, and prompts."""

    def __init__(self, config: DistillConfig, parallel: ParallelState):
        super().__init__(config, parallel)
        if config.anchor.weight:
            parallel.samples(config.anchor.batch, "anchor.batch")
        if config.gate_every:
            parallel.samples(GATE_CLIPS * config.anchor.batch, f"{GATE_CLIPS} * anchor.batch")
        self.student = self.load_network(config.student, "student", config.student_optim)
        self.critic = self.load_network(config.teacher, "critic", config.critic_optim, config.scored_by)
        self.teacher = self.load_network(config.teacher, preset=config.scored_by)
        self.prompts = open_prompts(config, pacing=config.pacing, long_trips=config.long_trips)
        self.negative = self.prompts.negative(config.negative_prompt) if config.guidance else None
        self.sigmas = warped_sigmas(config.denoising_steps, config.shift)
        self.anchor = Anchor(config, config.anchor, self.sigmas, parallel) if config.anchor.weight else None
        self.gate = RecallGate(config, config.anchor, config.gate_limit, parallel) if config.gate_every else None
        # Only the demo world has sample images: no other VAE is loaded.
        self.codec = load_demo_codec(config.codec_path) if config.data == "demo" else None

    def step(self, step: int) -> dict[str, float]:
        """One update of the critic, and in one of `critic_per_student` iterations one of the student; then the gate."""
        config, gate, trained = self.config, self.gate, self.trained["student"]
        if gate is None:
            return self._updates(step)
        gate.begin(self.student, trained)
        metrics = self._updates(step)
        if (step + 1) % config.gate_every == 0 or step + 1 == config.steps:
            metrics |= gate.check(self.student, trained)
            self.finished = gate.failed
        return metrics

    def extra_state(self) -> dict[str, Tensor]:
        return self.gate.state() if self.gate else {}

    def load_extra_state(self, state: dict[str, Tensor]) -> None:
        if self.gate:
            self.gate.load_state(state)
            self.finished = self.gate.failed

    def _updates(self, step: int) -> dict[str, float]:
        if (step + 1) % self.config.critic_per_student:
            return self._update(step, "critic")
        if self.config.share_rollouts:
            return self._update(step, "student", "critic")
        critic, student = self._update(step, "critic"), self._update(step, "student")
        return {**student, **critic, "tokens": critic["tokens"] + student["tokens"]}

    def _update(self, step: int, *names: str) -> dict[str, float]:
        """One update of each named network, all with the same rollouts. All losses precede all updates."""
        config, samples, is_student = self.config, self.parallel.samples(self.config.batch), "student" in names
        context_chunks, target_chunks, exit_step = self.draw_lengths(step, is_student)
        means: dict[str, dict[str, float]] = {name: {} for name in names}
        for number in samples:
            sample = (2 * step + is_student) * config.batch + number
            text = self.prompts.text(sample, context_chunks + target_chunks).to(self.parallel.device)
            rollout = self.rollout(text, context_chunks, target_chunks, exit_step, sample, is_student)
            rollout = self.with_shown_by(rollout, sample)
            for name, mean in means.items():
                generator = seeded_generator(config.seed, 0, step, number, name == "student")
                loss, metrics = self.loss(name, rollout, text, generator)
                self.gathered.only(self.trained[name].net)
                (loss / len(samples)).backward()
                metrics = {"loss": loss.item(), "promoted": promotion_rate(rollout.memory), **metrics}
                mean.update({key: mean.get(key, 0.0) + value / len(samples) for key, value in metrics.items()})
        metrics = {}
        for name, mean in means.items():
            mean = {key: self.parallel.mean(value) for key, value in mean.items()}
            if name == "student" and self.anchor:
                mean["anchor"] = self.anchor.add_gradients(self.student, step)
            mean |= self.trained[name].update(mean["loss"], self.lr_factor(step))
            metrics |= {f"student_{key}" if name == "student" else key: value for key, value in mean.items()}
        frames = (context_chunks + target_chunks) * config.memory.chunk
        return {**metrics, "rollout": frames, "tokens": config.batch * frames * config.frame_tokens}

    def draw_lengths(self, step: int, is_student: bool) -> tuple[int, int, int]:
        """Chunks of context, chunks of target and exit step: a function of the step, the same on every rank."""
        config, generator = self.config, seeded_generator(self.config.seed, 1, step, is_student)
        pick = lambda low, high: int(torch.randint(low, high + 1, (), generator=generator))
        last, share = len(self.sigmas) - 1, config.first_exit_share
        if share and last:
            exit_step = 0 if torch.rand((), generator=generator) < share else pick(1, last)
        else:
            exit_step = pick(0, last)
        target = pick(config.target_from, config.target_chunks)
        longest = config.longest_context(step)
        return pick(min(1, longest), longest), target, exit_step

    def rollout(
        self, text: Tensor, context_chunks: int, target_chunks: int, exit_step: int, sample: int, has_grad: bool
    ) -> Rollout:
        """The student's video for a prompt."""
        config = self.config
        student = Student(self.student, text, config.recompute, config.commit_attends)
        memory = empty_memory(config.memory, config.latent_size)
        noise = seeded_noise(config.seed * 1_000_003 + sample, config.latent_size)
        context = student.rollout(memory, context_chunks, self.sigmas, noise)
        return student.target(context, target_chunks, exit_step, self.sigmas, noise, has_grad)

    def with_shown_by(self, rollout: Rollout, sample: int) -> Rollout:
        """The rollout with `shown_by` of the target where a setting needs it."""
        config = self.config
        if (config.recall_weight == 1 and config.normaliser == "all") or not isinstance(self.prompts, DemoPrompts):
            return rollout
        slots, num_chunks = [memory.slots.all for memory in rollout.contexts], len(rollout.memory.latent_chunks)
        num_fast = config.memory.fast - config.memory.chunk
        shown_by = self.prompts.shown_by(sample, num_chunks, slots, num_fast).to(self.parallel.device)
        return dataclasses.replace(rollout, shown_by=shown_by)

    def noised_target(self, target: Tensor, generator: torch.Generator) -> tuple[float, Tensor, Tensor]:
        """A random noise level, the noise, and the target with that noise."""
        sigma = float(shift_sigma(torch.rand((), generator=generator), self.config.shift))
        sigma = min(max(sigma, MIN_SIGMA), MAX_SIGMA)
        noise = torch.randn(target.shape, generator=generator).to(target.device)
        return sigma, noise, add_noise(target, noise, sigma)

    def loss(self, name: str, rollout: Rollout, text: Tensor, generator: torch.Generator) -> Loss:
        """The loss of a network: the mean over the pieces of the target that are scored together."""
        loss_of = self.student_loss if name == "student" else self.critic_loss
        losses, means, num_frames = [], {}, rollout.target_BCTHW.shape[2]
        for piece in rollout.pieces(self.config.score_chunks or self.config.target_chunks):
            share = piece.target_BCTHW.shape[2] / num_frames
            loss, metrics = loss_of(piece, text, generator)
            losses.append(share * loss)
            means = {key: means.get(key, 0.0) + share * value for key, value in metrics.items()}
        return sum(losses[1:], start=losses[0]), means

    def score_inputs(self, memory: Memory, target: Tensor, text: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """What teacher and critic get: remembered frames [1, C, M, H, W], their texts, the texts of the target."""
        chunk, slots = self.config.memory.chunk, memory.slots
        frames = {"memory": slots.all, "recent": slots.fast, "nothing": ()}[self.config.teacher_sees]
        context = memory.latents_of(frames).to(self.parallel.device)
        if len(text) == 1:
            return context, text, text
        first = len(memory.latent_chunks)
        return context, text[[frame // chunk for frame in frames]], text[first : first + target.shape[2] // chunk]

    def student_loss(self, piece: Piece, text: Tensor, generator: torch.Generator) -> Loss:
        """0.5 mean (x - stopgrad(x - g))^2 with g = (critic - teacher) / mean |x - teacher|, x the target.

        `recall_weight` and `normaliser` change g.
        """
        memory, target, shown_by = piece
        with torch.no_grad():
            context, context_text, target_text = self.score_inputs(memory, target, text)
            sigma, _, x = self.noised_target(target.detach(), generator)
            fake = x0_given_context(self.critic, context, context_text, x, sigma, target_text)
            real = x0_given_context(self.teacher, context, context_text, x, sigma, target_text)
            if self.negative is not None:
                negative = self.negative.to(text)
                unwanted = x0_given_context(self.teacher, context, negative, x, sigma, negative)
                real = real + self.config.guidance * (real - unwanted)
            difference = (target - real).abs()
            gradient = ((fake - real) / self.normaliser(difference, shown_by)).nan_to_num()
            if shown_by is not None and self.config.recall_weight != 1:
                weights = torch.where(shown_by == ShownBy.MEMORY, self.config.recall_weight, 1.0)
                gradient = gradient * per_latent(weights, gradient)
        loss = 0.5 * (target - (target - gradient).detach()).double().square().mean()
        return loss, {"dmd_gradient": gradient.abs().mean().item()}

    def normaliser(self, difference: Tensor, shown_by: Tensor | None) -> Tensor:
        """Mean of |x - teacher| [1, C, T, H, W] over the columns that `normaliser` names."""
        if shown_by is not None and self.config.normaliser == "fast":
            columns = per_latent((shown_by == ShownBy.FAST).to(difference), difference)
            if columns.any():  # not in the first chunk of a video
                return (difference * columns).sum() / columns.expand_as(difference).sum()
        return difference.mean()

    def critic_loss(self, piece: Piece, text: Tensor, generator: torch.Generator) -> Loss:
        """Squared error of the critic's flow on the noised target."""
        memory, target = piece.memory, piece.target_BCTHW.detach()
        context, context_text, target_text = self.score_inputs(memory, target, text)
        sigma, noise, x = self.noised_target(target, generator)
        flow = flow_given_context(self.critic, context, context_text, x, sigma, target_text)
        return (flow - (noise - target)).square().mean(), {}

    @torch.no_grad()
    def sample(self) -> Image.Image | None:
        """Frames of a rollout under a fixed prompt, by the current weights."""
        if self.codec is None:
            return None
        chunks = self.config.sample_chunks
        text = self.prompts.text(0, chunks).to(self.parallel.device)
        memory = self.rollout(text, chunks - 1, 1, 0, 0, False).memory
        return film_strip(self.codec, memory.latent_chunks) if self.parallel.is_main else None

    def card(self) -> StudentCard:
        config, stage = self.config, "contextual" if self.config.context_to else "local"
        data = f"{self.prompts.describe()}; scores see {config.teacher_sees}; teacher {config.teacher}"
        steps = tuple(float(value) for value in config.denoising_steps)
        return StudentCard(
            name=f"{config.preset} student, {stage}", stage=stage, steps=steps, solver="renoise", data=data,
            commit_attends=config.commit_attends,
        )  # fmt: skip


def x0_given_context(
    network: Network, context: Tensor, context_text: Tensor, x: Tensor, sigma: float, text: Tensor
) -> Tensor:
    """Predicted x0 of a target (flow_given_context)."""
    return x0_from_flow(x, flow_given_context(network, context, context_text, x, sigma, text), sigma)


def per_latent(columns_BTN: Tensor, latents_BCTHW: Tensor) -> Tensor:
    """Values of token columns as [B, 1, T, 1, W], for latents of that width."""
    return columns_BTN.repeat_interleave(latents_BCTHW.shape[-1] // columns_BTN.shape[-1], dim=-1)[:, None, :, None]


def promotion_rate(memory: Memory) -> float:
    """Share of the frames that left fast memory and went to slow memory."""
    return sum(decision.promoted for decision in memory.decisions) / max(1, len(memory.decisions))
