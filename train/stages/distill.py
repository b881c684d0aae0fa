"""Stages `local` and `contextual`: distribution matching on rollouts of the student (docs/method.md, Distillation).

The student generates a context, then a target with gradients. The frozen teacher and the trained critic predict x0 of
the noised target given the same remembered frames. The difference is the direction of the student's update.
"""

from dataclasses import dataclass, field

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
from ..data.clips import open_prompts
from ..parallel import ParallelState
from ..stage import Stage
from .score import flow_given_context
from .student import Rollout, Student

MIN_SIGMA, MAX_SIGMA = 0.02, 0.98
"""Range of noise levels of a scored target."""
Loss = tuple[Tensor, dict[str, float]]
"""A loss and metrics."""


TEACHER_SEES = ("memory", "recent", "nothing")


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
    critic_per_student: int = 5
    guidance: float = 3.0
    """w of teacher + w (teacher - teacher without text); 0 is no guidance."""
    student_optim: OptimConfig = field(default_factory=lambda: OptimConfig(lr=2e-6, ema=0.99, ema_from=20))
    critic_optim: OptimConfig = field(default_factory=lambda: OptimConfig(lr=4e-7))
    sample_chunks: int = 28
    """Chunks of the rollout of the sample images."""
    out: str = "runs/contextual"

    def __post_init__(self):
        super().__post_init__()
        check_range(self, "target_from", "critic_per_student", "sample_chunks", above=0)
        check_choice(self, "teacher_sees", TEACHER_SEES)
        check_choice(self, "commit_attends", ATTENDS)
        check_choice(self, "teacher_preset", ("", *PRESETS))
        if backbone_of(self.scored_by) is not backbone_of(self.preset):
            raise ValueError(
                f"teacher_preset: {self.scored_by} and preset {self.preset} have different latents and texts; give two"
                " sizes of Wan 2.1"
            )
        check_range(self, "score_chunks", least=0, most=self.target_chunks)
        check_range(self, "target_from", most=self.target_chunks)
        check_range(self, "context_from", least=0, most=self.context_to)

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
        self.student = self.load_network(config.student, "student", config.student_optim)
        self.critic = self.load_network(config.teacher, "critic", config.critic_optim, config.scored_by)
        self.teacher = self.load_network(config.teacher, preset=config.scored_by)
        self.prompts = open_prompts(config)
        self.sigmas = warped_sigmas(config.denoising_steps, config.shift)
        # Only the demo world has sample images: no other VAE is loaded.
        self.codec = load_demo_codec(config.codec_path) if config.data == "demo" else None

    def step(self, step: int) -> dict[str, float]:
        """One update of the critic, and in one of `critic_per_student` iterations one of the student."""
        metrics = self._update(step, "critic")
        if (step + 1) % self.config.critic_per_student == 0:
            student = self._update(step, "student")
            metrics["tokens"] += student.pop("tokens")
            metrics |= {f"student_{name}": value for name, value in student.items() if name != "rollout"}
        return metrics

    def _update(self, step: int, name: str) -> dict[str, float]:
        config, samples, is_student = self.config, self.parallel.samples(self.config.batch), name == "student"
        context_chunks, target_chunks, exit_step = self.draw_lengths(step, is_student)
        means: dict[str, float] = {}
        for number in samples:
            sample = (2 * step + is_student) * config.batch + number
            text = self.prompts.text(sample, context_chunks + target_chunks).to(self.parallel.device)
            rollout = self.rollout(text, context_chunks, target_chunks, exit_step, sample, is_student)
            generator = seeded_generator(config.seed, 0, step, number, is_student)
            loss, metrics = self.loss(name, rollout, text, generator)
            self.gathered.only(self.trained[name].net)
            (loss / len(samples)).backward()
            metrics = {"loss": loss.item(), "promoted": promotion_rate(rollout.memory), **metrics}
            means = {key: means.get(key, 0.0) + value / len(samples) for key, value in metrics.items()}
        means = {key: self.parallel.mean(value) for key, value in means.items()}
        update = self.trained[name].update(means["loss"], self.lr_factor(step))
        frames = (context_chunks + target_chunks) * config.memory.chunk
        return {**means, **update, "rollout": frames, "tokens": config.batch * frames * config.frame_tokens}

    def draw_lengths(self, step: int, is_student: bool) -> tuple[int, int, int]:
        """Chunks of context, chunks of target and exit step: a function of the step, the same on every rank."""
        config, generator = self.config, seeded_generator(self.config.seed, 1, step, is_student)
        pick = lambda low, high: int(torch.randint(low, high + 1, (), generator=generator))
        exit_step = pick(0, len(self.sigmas) - 1)
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
        for context, target in rollout.pieces(self.config.score_chunks or self.config.target_chunks):
            share = target.shape[2] / num_frames
            loss, metrics = loss_of(context, target, text, generator)
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

    def student_loss(self, memory: Memory, target: Tensor, text: Tensor, generator: torch.Generator) -> Loss:
        """0.5 mean (x - stopgrad(x - g))^2 with g = (critic - teacher) / mean |x - teacher|, x the target."""
        with torch.no_grad():
            context, context_text, target_text = self.score_inputs(memory, target, text)
            sigma, _, x = self.noised_target(target.detach(), generator)
            fake = x0_given_context(self.critic, context, context_text, x, sigma, target_text)
            real = x0_given_context(self.teacher, context, context_text, x, sigma, target_text)
            if self.config.guidance:
                empty = self.prompts.empty.to(text)
                unguided = x0_given_context(self.teacher, context, empty, x, sigma, empty)
                real = real + self.config.guidance * (real - unguided)
            gradient = ((fake - real) / (target - real).abs().mean()).nan_to_num()
        loss = 0.5 * (target - (target - gradient).detach()).double().square().mean()
        return loss, {"dmd_gradient": gradient.abs().mean().item()}

    def critic_loss(self, memory: Memory, target: Tensor, text: Tensor, generator: torch.Generator) -> Loss:
        """Squared error of the critic's flow on the noised target."""
        target = target.detach()
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


def promotion_rate(memory: Memory) -> float:
    """Share of the frames that left fast memory and went to slow memory."""
    return sum(decision.promoted for decision in memory.decisions) / max(1, len(memory.decisions))
