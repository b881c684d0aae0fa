"""The measurements of `context-forcing bench` at each size: loops in turn, a film end to end, growth, drift."""

import contextlib
import dataclasses
import functools
import itertools
import logging
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence, Sized
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ..memory.fields import brief
from ..memory.memory import Memory
from ..model.device import is_out_of_memory
from ..model.sampler import MAX_SECONDS, CausalSampler
from ..model.segment import generate_segment
from ..model.units import FRAMES_PER_LATENT, latent_size
from ..video.consistency import measure_consistency
from ..video.frames import to_uint8
from ..video.mp4 import default_scale, write_video
from .clock import PartClock, Spent, peak_bytes
from .loops import Loop, OurLoop, filled, make_port
from .ports import PORTS
from .results import Drift, Film, Growth, Result, Speed, relative_difference
from .subject import PROMPT, Setup, Subject

log = logging.getLogger("context_forcing")

EARLY, LATE = 12, 300
"""Finished chunks of the two memories that the growth check compares."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What is measured, and how often."""

    setups: tuple[Setup, ...]
    """The first one is what the others are compared with."""
    sizes: tuple[tuple[int, int], ...]
    """Width and height in pixels, each measured; the loops of all sizes are timed in turn."""
    chunks: int = 5
    """Timed chunks of every loop."""
    warmup: int = 2
    """Chunks of every loop before them, which are not timed."""
    ports: bool = True
    film: bool = True
    growth: bool = False
    drift: bool = False
    seconds: float = 60.0
    """Length of the videos that `drift` compares."""
    seed: int = 0

    def __post_init__(self):
        for name in ("chunks", "warmup"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: {getattr(self, name)} is below 1; give 1 or more")
        if not 0 < self.seconds < MAX_SECONDS:
            raise ValueError(f"seconds: {self.seconds} must be above 0 and below {MAX_SECONDS:g}")
        for size in self.sizes:
            latent_size(*size)
        if not self.sizes or len({*self.sizes}) < len(self.sizes):
            raise ValueError(f"size: {self.sizes} must be one size or more, each once")
        if self.drift and len(self.setups) < 2:
            raise ValueError("drift: there is one setup; give --options with two values or more, the reference first")

    @property
    def num_chunks(self) -> int:
        """Chunks of every loop, warm-up included."""
        return self.warmup + self.chunks


@torch.inference_mode()
def measure(subject: Subject, plan: Plan, say: Callable[[str], None] = log.info) -> list[Result]:
    """Measure what a plan asks for, a result for each size.

    Raises ValueError if no setup runs on this machine, and for a drift of one.
    """
    benches = [_Bench(subject, plan, size, say) for size in plan.sizes]
    for bench in benches:
        bench.begin()
    _time(benches, plan, say)
    return [bench.result() for bench in benches]


def _time(benches: Sequence["_Bench"], plan: Plan, say: Callable[[str], None]) -> None:
    """All loops in turn, chunk by chunk; another one begins every round."""
    timed = [(bench, loop) for bench in benches for loop in (*bench.ours, *bench.ports)]
    for number in range(plan.num_chunks):
        shift = number % len(timed)
        for bench, loop in timed[shift:] + timed[:shift]:
            spent = bench.timed(loop)
            if number >= plan.warmup:
                bench.rounds.setdefault(loop.name, []).append(spent)
        say(f"round {number + 1} of {plan.num_chunks}")


class _Bench:
    """The measurements of one plan at one size."""

    def __init__(self, subject: Subject, plan: Plan, size: tuple[int, int], say: Callable[[str], None]):
        self.subject, self.plan, self.size = subject, plan, size
        self.say = say if len(plan.sizes) == 1 else lambda note: say(f"{size[0]}x{size[1]}: {note}")
        self.ours: list[OurLoop] = []
        self.ports: list[Loop] = []
        self.rounds: dict[str, list[Spent]] = {}
        self.clock = PartClock(subject.device)
        self.not_run: dict[str, str] = {}
        self.memories: dict[object, Memory] = {}
        self.first_x0: dict[str, Tensor] = {}
        """The first chunk of every loop. All of them attend to the same frames."""
        self.measured_bytes: dict[str, int] = {}

    @contextlib.contextmanager
    def _trying(self, name: str) -> Iterator[None]:
        """Note why a loop does not run, and go on with the others."""
        try:
            yield
        except (ValueError, MemoryError, RuntimeError) as error:
            if not (isinstance(error, ValueError) or is_out_of_memory(error)):
                raise
            self.not_run[name] = brief(error, 200)
            self.say(f"{name}: not run: {self.not_run[name]}")

    def begin(self) -> None:
        """Warm up every loop that runs here. Raises ValueError if there are too few of ours."""
        for setup in self.plan.setups:
            name = setup.differences(Setup()) or "default"
            with self._trying(name):
                loop = OurLoop(name, self.subject, setup, self._memory(setup), self.plan.seed)
                self._warm_up(loop)
                self.ours.append(loop)
        if not self.ours:
            reason = next(iter(self.not_run.values()))
            raise ValueError(f"options: no setup runs on this machine ({reason}); give others")
        if self.plan.drift and len(self.ours) < 2:
            only = self.ours[0].name
            raise ValueError(f"drift: only {only} runs on this machine; there is nothing to compare it with")
        for kind in PORTS if self.plan.ports else ():
            with self._trying(kind.name):
                port = make_port(kind, self.ours[0], self.subject)
                self._warm_up(port)
                self.ports.append(port)

    def result(self) -> Result:
        """What was timed, and the films, growth and drift of the plan."""
        plan = self.plan
        return Result(
            size=self.size,
            speed=self._speed(),
            films=tuple(self.film(loop) for loop in self.ours if plan.film),
            growth=tuple(self.growth(loop) for loop in self.ours[:1] if plan.growth),
            drift=self.drift(self.ours) if plan.drift else (),
            not_run=self.not_run,
        )

    def _memory(self, setup: Setup) -> Memory:
        """A full memory; setups that differ in nothing that it depends on share it."""
        empty = self.subject.empty_memory(setup, self.size)
        pipeline = self.subject.pipeline(setup)
        key = (
            empty.config,
            pipeline.network.dtype,
            setup.kv_placement == "from RAM",
            setup.commit_attends,
            setup.kv_dtype,
        )
        if key not in self.memories:
            self.say(f"filling a memory of {empty.config.capacity} frames")
            text = pipeline.text_encoder.encode(PROMPT)
            sampler = self.subject.sampler(dataclasses.replace(setup, compile="off"), text)
            self.memories[key] = filled(sampler, empty, self.plan.seed)
        return self.memories[key]

    def _warm_up(self, loop: Loop) -> None:
        """The first chunk of a loop, which compiles what is compiled, and one that is measured for memory."""
        self.say(f"{loop.name}: warm-up")
        self.first_x0[loop.name] = loop.chunk()
        held = loop.held_bytes()
        self.measured_bytes[loop.name] = held + peak_bytes(self.subject.device, loop.chunk)

    def _speed(self) -> tuple[Speed, ...]:
        reference, ours = self.first_x0[self.ours[0].name], self.ours
        return tuple(
            Speed(
                name=loop.name,
                rounds=tuple(self.rounds[loop.name]),
                frames=_chunk_frames(ours[0].memory),
                weights_bytes=self._weights_bytes(loop.setup if isinstance(loop, OurLoop) else ours[0].setup),
                predicted_bytes=loop.predicted_bytes() if isinstance(loop, OurLoop) else None,
                measured_bytes=self.measured_bytes[loop.name],
                difference=relative_difference(self.first_x0[loop.name], reference),
            )
            for loop in (*ours, *self.ports)
        )

    def timed(self, loop: Loop) -> Spent:
        self.clock.switch("denoise")
        loop.chunk(self.clock.switch)
        return self.clock.take()

    def _weights_bytes(self, setup: Setup) -> int:
        """Bytes of the student's weights, both sets if it has two."""
        network = self.subject.pipeline(setup).network
        nets = [network.net, *([network.commit.net] if network.commit else [])]
        return sum(weight.nbytes for net in nets for weight in net.parameters())

    def film(self, loop: OurLoop) -> Film:
        """A video from the full memory on."""
        self.say(f"{loop.name}: film")
        text_seconds, chunks = self._parts(loop)
        overlapped, end_seconds = self._overlapped(loop)
        return Film(
            name=loop.name,
            text_seconds=text_seconds,
            chunks=tuple(chunks),
            overlapped=tuple(overlapped),
            end_seconds=end_seconds,
            frames=_chunk_frames(loop.memory),
        )

    def _parts(self, loop: OurLoop) -> tuple[float, list[Spent]]:
        """Seconds of the text, and of the parts of every chunk after the warm-up, on one thread."""
        clock, text_seconds, chunks = self.clock, 0.0, []

        def latents(begin: Callable[[], None]) -> Iterator[Tensor]:
            nonlocal text_seconds
            clock.switch("text")
            for number, memory in enumerate(self._segment(loop, loop.memory, self.plan.num_chunks, clock)):
                clock.switch("decode")
                yield memory.latent_chunks[-1]
                spent = clock.take()
                text_seconds += spent.wall.pop("text", 0.0)
                if number >= self.plan.warmup:
                    chunks.append(spent)
                begin()
                clock.switch("denoise")

        def decoded(begin: Callable[[], None]) -> Iterator[Tensor]:
            pixels = self.subject.pipeline(loop.setup).decode(latents(begin))
            while (run := next(pixels, None)) is not None:
                clock.switch("encode")
                yield run
                clock.switch("decode")

        with self._film_file() as write, loop.watched(clock.switch) as begin:
            begin()
            write(decoded(begin))
        clock.take()
        return text_seconds, chunks

    def _overlapped(self, loop: OurLoop) -> tuple[list[float], float]:
        """Seconds of every chunk after the warm-up as `generate` runs them, and those after the last one.

        A chunk is done when it is decoded: denoising runs ahead of that by the chunks that wait.
        """
        done: list[float] = []
        num_frames = FRAMES_PER_LATENT - 1  # The first latent frame has so many pixel frames less.

        def count(frames: Sized) -> None:
            nonlocal num_frames
            num_frames += len(frames)
            if num_frames // _chunk_frames(loop.memory) > len(done):
                done.append(time.perf_counter())

        latents = (memory.latent_chunks[-1] for memory in self._segment(loop, loop.memory, self.plan.num_chunks))
        with self._film_file() as write:
            write(latents, decoding=self.subject.pipeline(loop.setup).decoding, on_frames=count)
        seconds = [after - before for before, after in itertools.pairwise(done[self.plan.warmup - 1 :])]
        return seconds, time.perf_counter() - done[-1]

    @contextlib.contextmanager
    def _film_file(self) -> Iterator[Callable[..., int]]:
        """`write_video` to a file that is deleted."""
        with tempfile.TemporaryDirectory() as folder:
            how = dict(fps=self.subject.card.fps, scale=default_scale(*self.size))
            yield functools.partial(write_video, Path(folder) / "film.mp4", **how)

    def _segment(
        self, loop: OurLoop, memory: Memory, num_chunks: int, clock: PartClock | None = None
    ) -> Iterator[Memory]:
        """A memory continued chunk by chunk as `generate` does it. A clock is told where the text ends."""

        def sampler_of(text_BLC: Tensor) -> CausalSampler:
            sampler = loop.sampler.under(text_BLC)
            if clock:
                clock.switch("denoise")
            return sampler

        text = self.subject.pipeline(loop.setup).text_encoder.encode(PROMPT)
        return generate_segment(
            sampler_of, memory, text, prompt=PROMPT, seed=self.plan.seed, num_chunks=num_chunks, sigmas=loop.sigmas
        )

    def growth(self, loop: OurLoop) -> Growth:
        """The chunk after EARLY chunks and the one after LATE, in turn."""
        self.say(f"{loop.name}: memories of {EARLY} and {LATE} chunks")
        empty = self.subject.empty_memory(loop.setup, self.size)
        early = filled(loop.sampler, empty, self.plan.seed, EARLY)
        late = filled(loop.sampler, early, self.plan.seed, LATE - EARLY)
        spent: dict[int, list[Spent]] = {EARLY: [], LATE: []}
        for number in range(self.plan.num_chunks):
            at = [(EARLY, early), (LATE, late)]
            for length, memory in at if number % 2 else at[::-1]:
                self.clock.switch("denoise")
                loop.continued(memory, self.clock.switch)
                seconds = self.clock.take()
                if number >= self.plan.warmup:
                    spent[length].append(seconds)
        return Growth(name=loop.name, early=tuple(spent[EARLY]), late=tuple(spent[LATE]))

    def drift(self, loops: Sequence[OurLoop]) -> tuple[Drift, ...]:
        """The same video under every setup, from an empty memory, compared chunk by chunk with the first one."""
        made = {loop.name: self._video(loop) for loop in loops}
        (reference, reference_motion), *others = made.values()
        return tuple(
            Drift(
                name=loop.name,
                difference=tuple(relative_difference(a, b) for a, b in zip(latents, reference)),
                motion=motion,
                reference_motion=reference_motion,
            )
            for loop, (latents, motion) in zip(loops[1:], others)
        )

    def _video(self, loop: OurLoop) -> tuple[list[Tensor], tuple[float, ...]]:
        """The latents of every chunk of a video, and its motion from one chunk to the next."""
        self.say(f"{loop.name}: video of {self.plan.seconds:g} s")
        fps, pipeline = self.subject.card.fps, self.subject.pipeline(loop.setup)
        frames = _chunk_frames(loop.memory)
        num_chunks = max(2, round(self.plan.seconds * fps / frames))
        memory = self.subject.empty_memory(loop.setup, self.size)
        for memory in self._segment(loop, memory, num_chunks):
            pass
        pixels = (frame for run in pipeline.decode(memory.latent_chunks) for frame in to_uint8(run))
        curve = measure_consistency(pixels, fps, {}, frames / fps, loop.name)
        return list(memory.latent_chunks), curve.motion[1:]


def _chunk_frames(memory: Memory) -> int:
    """Pixel frames of a chunk."""
    return memory.config.chunk * FRAMES_PER_LATENT
