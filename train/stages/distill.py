"""Stages `local` and `contextual`: distribution matching on the student's own rollouts (method.md 4.2-4.5, 5.3, 5.4).

Each iteration the student makes a context, then a target with gradients. A frozen teacher and a trained critic score
the noised target, both given the same remembered frames through their own keys; the difference of their x0 is the
direction in which the student's videos are wrong. `local` has no context. With `teacher_sees: nothing` the scores are
given nothing to remember, as LongLive trains; with a memory preset of another kind the student is.
"""

from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from ...memory.memory import Memory, empty_memory
from ...model.codecs.demo_vae import load_demo_codec
from ...model.config import StudentCard
from ...model.flow import add_noise, shift_sigma, warped_sigmas, x0_from_flow
from ...model.sampler import Noise, seeded_noise
from ...video.film_strip import film_strip
from ..config import DistillConfig
from ..data.clips import open_prompts
from ..parallel import ParallelState
from ..stage import Stage, load_network, seeded_generator
from ..trained_network import TrainedNetwork
from .score import NOTHING, Score
from .student import Rollout, Student

MIN_SIGMA, MAX_SIGMA = 0.02, 0.98
"""Noise levels a target is scored at."""


class DistillStage(Stage):
    """Student and critic, the frozen teacher, and prompts."""

    def __init__(self, config: DistillConfig, parallel: ParallelState):
        super().__init__(config, parallel)
        self.student, self.init_card = load_network(config.student, config, parallel, config.lora)
        critic, _ = load_network(config.teacher, config, parallel, config.lora)
        teacher, _ = load_network(config.teacher, config, parallel, None)
        self.trained = {
            "student": TrainedNetwork(self.student.net, config.student_optim, parallel),
            "critic": TrainedNetwork(critic.net, config.critic_optim, parallel),
        }
        self.critic, self.teacher = Score(critic), Score(teacher)
        self.prompts = open_prompts(config)
        self.sigmas = warped_sigmas(config.denoising_steps, config.shift)
        self.latent_size = config.latent_size
        # Sample pictures of the demo world only: there is no VAE for others here.
        self.codec = load_demo_codec(config.codec_path) if config.data == "demo" else None

    def step(self, step: int) -> dict[str, float]:
        """An update of the critic, and every `critic_per_student` iterations one of the student."""
        values = self._update(step, "critic")
        if (step + 1) % self.config.critic_per_student == 0:
            student = self._update(step, "student")
            values["tokens"] += student.pop("tokens")
            values |= {f"student_{name}": value for name, value in student.items() if name != "rollout"}
        return values

    def _update(self, step: int, name: str) -> dict[str, float]:
        config, samples = self.config, self.parallel.samples(self.config.batch)
        learns_student = name == "student"
        context_chunks, target_chunks, exit_step = self.draw_lengths(step, learns_student)
        sums: dict[str, float] = {}
        for number in samples:
            generator = seeded_generator(config.seed, 0, step, number, learns_student)
            sample = (2 * step + learns_student) * config.batch + number
            text = self.prompts.text(sample, context_chunks + target_chunks).to(self.parallel.device)
            rolled = self.roll(text, context_chunks, target_chunks, exit_step, sample, learns_student)
            loss, values = self.loss(name, rolled, text, generator)
            (loss / len(samples)).backward()
            values = {"loss": loss.item(), "promoted": promotion_rate(rolled.memory), **values}
            for key, value in values.items():
                sums[key] = sums.get(key, 0.0) + value / len(samples)
        sums = {key: self.parallel.mean(value) for key, value in sums.items()}
        updated = self.trained[name].update(sums["loss"], self.lr_factor(step))
        rollout = (context_chunks + target_chunks) * config.memory.chunk
        return {**sums, **updated, "rollout": rollout, "tokens": config.batch * rollout * config.frame_tokens}

    def draw_lengths(self, step: int, learns_student: bool) -> tuple[int, int, int]:
        """Chunks of context, chunks of target, exit step: a function of the step, the same on every rank.

        The context grows from `context_from` to `context_to` chunks over `context_ramp` iterations; every
        `local_every`-th round has none, to keep short videos good.
        """
        config, generator = self.config, seeded_generator(self.config.seed, 1, step, learns_student)
        pick = lambda low, high: int(torch.randint(low, high + 1, (), generator=generator))
        exit_step = pick(0, len(self.sigmas) - 1)
        target = pick(config.target_from, config.target_chunks)
        ramp = min(1.0, step / config.context_ramp) if config.context_ramp else 1.0
        longest = config.context_from + round((config.context_to - config.context_from) * ramp)
        context = pick(min(1, longest), longest)
        round_number = step // config.critic_per_student
        if config.local_every and (round_number + 1) % config.local_every == 0:
            context = 0
        return context, target, exit_step

    def roll(
        self, text: Tensor, context_chunks: int, target_chunks: int, exit_step: int, sample: int, with_gradient: bool
    ) -> Rollout:
        """The student's own video for a prompt."""
        noise = self._noise(sample)
        student = self.student_under(text)
        context = student.rollout(self._empty(), context_chunks, self.sigmas, noise)
        return student.target(context, target_chunks, exit_step, self.sigmas, noise, with_gradient)

    def student_under(self, text: Tensor) -> Student:
        """The student under the texts of a rollout."""
        return Student(self.student, text, self.config.recompute)

    def _empty(self) -> Memory:
        return empty_memory(self.config.memory, self.latent_size)

    def _noise(self, sample: int) -> Noise:
        return seeded_noise(self.config.seed * 1_000_003 + sample, self.latent_size)

    def noised(self, target: Tensor, generator: torch.Generator) -> tuple[float, Tensor, Tensor]:
        """A noise level, the noise, and the target at that level."""
        sigma = float(shift_sigma(torch.rand((), generator=generator), self.config.shift))
        sigma = min(max(sigma, MIN_SIGMA), MAX_SIGMA)
        noise = torch.randn(target.shape, generator=generator).to(target.device)
        return sigma, noise, add_noise(target, noise, sigma)

    def loss(self, name: str, rolled: Rollout, text: Tensor, generator: torch.Generator) -> tuple[Tensor, dict]:
        """What a network learns from a rollout: the mean over the pieces of the target that are scored together."""
        score = self.student_loss if name == "student" else self.critic_loss
        num_frames = rolled.target_BCTHW.shape[2]
        total, figures = 0.0, {}
        for context, target in rolled.windows(self.config.score_chunks or self.config.target_chunks):
            share = target.shape[2] / num_frames
            loss, values = score(context, target, text, generator)
            total = total + share * loss
            figures = {key: figures.get(key, 0.0) + share * value for key, value in values.items()}
        return total, figures

    def remembered(self, context: Memory, target: Tensor, text: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """What the scores are given: remembered frames [1, C, M, H, W], their texts, the texts of the target."""
        chunk, slots = self.config.memory.chunk, context.slots
        frames = {"memory": slots.all, "recent": slots.fast, "nothing": ()}[self.config.teacher_sees]
        first = len(context.latent_chunks)
        target_text = text if len(text) == 1 else text[first : first + target.shape[2] // chunk]
        frame_text = text if len(text) == 1 else text[[frame // chunk for frame in frames]]
        return context.latents_of(frames).to(self.parallel.device), frame_text, target_text

    def student_loss(
        self, memory: Memory, target: Tensor, text: Tensor, generator: torch.Generator
    ) -> tuple[Tensor, dict]:
        """0.5 mean (x - stopgrad(x - g))^2 with g = (critic - teacher) / mean |x - teacher| (method.md 4.3)."""
        with torch.no_grad():
            context, frame_text, target_text = self.remembered(memory, target, text)
            sigma, _, x = self.noised(target.detach(), generator)
            fake = self._x0(self.critic, context, frame_text, target_text, x, sigma)
            real = self._x0(self.teacher, context, frame_text, target_text, x, sigma)
            if self.config.guidance:
                blank = self.prompts.empty.to(text)
                plain = self._x0(self.teacher, context, blank, blank, x, sigma)
                real = real + self.config.guidance * (real - plain)
            gradient = (fake - real) / (target - real).abs().mean()
            gradient = gradient.nan_to_num()
        loss = 0.5 * (target - (target - gradient).detach()).double().square().mean()
        return loss, {"dmd_gradient": gradient.abs().mean().item()}

    def critic_loss(
        self, memory: Memory, target: Tensor, text: Tensor, generator: torch.Generator
    ) -> tuple[Tensor, dict]:
        """Flow error on the student's target, given what the teacher is given (method.md 4.4)."""
        target = target.detach()
        context, frame_text, target_text = self.remembered(memory, target, text)
        sigma, noise, x = self.noised(target, generator)
        view = self.critic.remember(context, frame_text)
        flow = self.critic.flow(view, x, sigma, target_text)
        return (flow - (noise - target)).square().mean(), {}

    def _x0(self, score: Score, context: Tensor, frame_text: Tensor, target_text: Tensor, x: Tensor, sigma: float):
        view = score.remember(context, frame_text) if context.shape[2] else NOTHING
        return x0_from_flow(x, score.flow(view, x, sigma, target_text), sigma)

    @torch.no_grad()
    def sample(self) -> Image.Image | None:
        """A filmstrip of a rollout under a fixed prompt, by the weights as they are."""
        if self.codec is None:
            return None
        chunks = self.config.sample_chunks
        text = self.prompts.text(0, chunks).to(self.parallel.device)
        memory = self.student_under(text).rollout(self._empty(), chunks, self.sigmas, self._noise(0))
        return film_strip(self.codec, memory.latent_chunks) if self.parallel.is_main else None

    def export(self, folder: Path, step: int, seconds: float, revision: str) -> Path:
        """The student's averaged weights with a card that says how to use them."""
        config = self.config
        card = StudentCard(
            name=f"{config.preset} student, {config.stage_name}", base=config.preset, stage=config.stage_name,
            steps=tuple(float(value) for value in config.denoising_steps), shift=config.shift, solver="renoise",
            memory=config.memory, size=tuple(config.size),
            data=f"{self.prompts.describe()}; scores see {config.teacher_sees}; teacher {config.teacher}",
        )  # fmt: skip
        return self.save(folder / "student.safetensors", "student", card, step, seconds, revision)


def promotion_rate(memory: Memory) -> float:
    """Share of the frames leaving fast that slow memory took."""
    return sum(decision.promoted for decision in memory.decisions) / max(1, len(memory.decisions))
