"""Generation of a video file from a story. Everything is checked before work begins, and finished chunks are kept."""

import contextlib
import dataclasses
import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from ..memory.config import MemoryConfig, named_memory
from ..memory.fields import brief, one_line
from ..memory.files import check_writable
from ..memory.history import remembered_parts
from ..memory.memory import Memory
from ..memory.snapshot import load_memory, save_memory
from ..model.attention import load_attention
from ..model.checkpoints.locate import BUILT_IN
from ..model.checkpoints.student import StudentFile, StudentSource
from ..model.codecs.backbone import Codecs, backbone_of
from ..model.config import StudentCard
from ..model.device import is_out_of_memory, name_of_dtype, pick_device, use_cpu_threads
from ..model.fingerprint import fingerprint
from ..model.fit import say_what_fits
from ..model.sampler import SamplerOptions
from ..model.sequence import Processes, joined
from ..model.units import FRAMES_PER_LATENT
from .frames import save_picture, thumbnails
from .journal import Journal, journal_inputs, journal_path
from .mp4 import check_scale, default_scale, hold_output, write_video
from .pipeline import Pipeline
from .provenance import GivenFile, Provenance, git_revision, libraries, machine_of, not_the_same, read_provenance
from .report import draw_report, summary
from .story import ResolvedStory, Story
from .storyboard import read_story

log = logging.getLogger("context_forcing")

Load = Callable[[StudentFile, torch.device, torch.dtype, Codecs, bool], Pipeline]
"""What loads a student in the place of Pipeline.load, and may keep it for the next video."""


@dataclass(frozen=True, kw_only=True)
class GenerateRequest:
    """What to generate, from which files, and where to write it: the options of `context-forcing generate`."""

    story: Path | None = None
    like: Path | None = None
    """A video that is made again, instead of a story. What is not given here is as it was there."""
    output: Path
    student: StudentSource
    loras: tuple[str, ...] = ()
    """The LoRAs of the student as the user wrote them, for the journal."""
    text_encoder: str | None = None
    vae: str | None = None
    decoder: str | None = None
    """A tiny decoder that decodes instead of the VAE."""
    models_dir: Path | None = None
    seed: int | None = None
    memory: str | None = None
    settings: Mapping[str, object] = field(default_factory=dict)
    """Fields of the memory's configuration that replace its own."""
    device: str = "auto"
    dtype: str = "auto"
    offload: bool = False
    attention: str | None = None
    """None: sdpa."""
    commit_attends: str | None = None
    """What the commit pass attends to; None: as the story, or else the student's card, says."""
    kv_placement: str = "at once"
    kv_dtype: str | None = None
    """How sink and slow frames are stored; None: auto."""
    memory_in: Path | None = None
    memory_out: Path | None = None
    compact: bool = False
    start: Path | None = None
    references: tuple[Path, ...] = ()
    """The pictures of the story of `like`, in its order."""
    resume: bool = False
    report: Path | None = None
    scale: int | None = None

    def check(self) -> None:
        """Raises ValueError if a file cannot be written where it is requested, or an option excludes another."""
        if (self.story is None) == (self.like is None):
            raise ValueError("story: give either a STORY, or --like with a video that is made again")
        if self.references and self.like is None:
            raise ValueError("--reference: is for --like; a story names its pictures in `references`")
        for option, path in (("--memory-out", self.memory_out), ("--report", self.report)):
            if path is not None:
                check_writable(option, path)
        if self.scale is not None:
            check_scale("--scale", self.scale)
        if self.report is not None and self.report.suffix.lower() != ".png":
            raise ValueError(f"--report: {self.report} does not end in .png; give a name that does")
        if self.compact and self.memory_out is None:
            raise ValueError("--compact: there is no --memory-out that it applies to; give one")
        if self.memory_out and self.memory_in and self.memory_out.resolve() == self.memory_in.resolve():
            raise ValueError(f"--memory-out: {self.memory_out} is --memory-in; give another file, --resume needs both")

    def memory_settings(self, trained: MemoryConfig) -> dict[str, object]:
        """Fields of the memory's configuration that replace those it was trained with. Raises ValueError."""
        named = {} if self.memory is None else dataclasses.asdict(named_memory(self.memory, trained))
        return named | dict(self.settings)

    def filled(self, made: Provenance) -> "GenerateRequest":
        """This request with the options of a video where it has none, for everything but the memory.

        Raises ValueError for a file that made the video and is not given. No file that the video names is opened.
        """
        student = self.student
        for option, file, is_given in (
            ("--student", made.student_file != BUILT_IN and f"{made.student_file}, {made.student}", student.path),
            *(("--lora", lora, student.loras) for lora in made.loras),
            ("--start", made.start, self.start),
            ("--memory-in", made.memory_in, self.memory_in),
            ("--decoder", made.decoder_file, self.decoder),
        ):
            if file and not is_given:
                raise ValueError(one_line(f"{option}: give {file}, with which {self.like} was made"))
        if len(self.references) != len(made.references):
            names = ", ".join(map(str, made.references)) or "no picture"
            given = f"{len(self.references)} given, give as many as made {self.like}, in this order"
            raise ValueError(one_line(f"--reference: {given}: {names}"))
        student = dataclasses.replace(
            student,
            weights=made.weights if student.weights == "auto" else student.weights,
            card=made.published if student.card == "auto" else student.card,
            overrides=student.overrides or made.overrides,
        )
        return dataclasses.replace(
            self,
            student=student,
            device=made.device if self.device == "auto" else self.device,
            dtype=made.dtype if self.dtype == "auto" else self.dtype,
            attention=self.attention or made.attention,
            commit_attends=self.commit_attends or made.commit_attends,
            kv_dtype=self.kv_dtype or made.kv_dtype,
            scale=self.scale or made.scale,
        )


@dataclass(kw_only=True)
class GenerateJob:
    """A video that is ready to be generated."""

    request: GenerateRequest
    pipeline: Pipeline
    options: SamplerOptions
    story: ResolvedStory
    scale: int
    """How many times each pixel is enlarged."""
    memory: Memory
    """The memory after the last finished chunk."""
    journal: Journal | None
    """None in a process that helps another one (model/sequence.py)."""
    finished: Sequence[Tensor]
    """Chunks of an earlier run."""
    made: Provenance
    """What makes the video, for its file."""
    is_whole: bool = False
    """Whether the video is written. Memory and report may not be."""

    def run(self, on_chunk: Callable[[int, str], None] = lambda finished, note: None) -> int:
        """Generate the video, and decode and write it on a second thread. Returns its number of pixel frames.

        A process that helps another one writes nothing and returns 0. `on_chunk` is called after every chunk with the
        number of finished chunks and a note on speed and memory. After an error or an interrupt `memory_out` holds what
        is finished, and the journal can be resumed. Raises ValueError for files that cannot be written, and if memory
        is at its end.
        """
        request, story = self.request, self.story
        if self.journal is None:
            for _ in self._latents(on_chunk):
                pass
            return 0
        try:
            num_frames = write_video(
                request.output, self._latents(on_chunk), decoding=self.pipeline.decoding, fps=story.fps,
                scale=self.scale, metadata=self.made.tags(),
            )  # fmt: skip
            self.is_whole = True
            self._save_memory()
            if request.report is not None:
                pictures = thumbnails(self.memory, self.pipeline.decode)
                save_picture(request.report, draw_report(self.memory, pictures, story.fps))
        except (ValueError, MemoryError, RuntimeError) as error:
            raise self._explained(error) from None
        finally:
            if not self.is_whole:
                self._save_unfinished()
        self.journal.close()
        return num_frames

    def _save_memory(self) -> None:
        """Raises ValueError if it cannot be written."""
        path = self.request.memory_out
        if path is not None and self.memory.latent_chunks:
            save_memory(path, self.memory.compact() if self.request.compact else self.memory)

    def _save_unfinished(self) -> None:
        """Save the memory so far. A second error is logged, because the first one is on its way to the user."""
        try:
            self._save_memory()
        except ValueError as error:
            log.warning("--memory-out: %s", error)

    def _explained(self, error: Exception) -> Exception:
        """The error with what is kept and the remedy, if it is one of files or memory."""
        if self.is_whole and isinstance(error, ValueError):
            output = self.request.output
            return ValueError(f"{error}; {output} is whole: make room or give another name, then --resume writes this")
        if is_out_of_memory(error):
            kept = "the finished chunks are kept: --resume with" if self.has_chunks else "give"
            return ValueError(f"out of memory ({brief(error)}); {kept} --offload or --kv-placement 'from RAM'")
        return error

    @property
    def has_chunks(self) -> bool:
        """Whether there is a chunk to resume from."""
        return self.journal is not None and self.journal.has_chunks

    @property
    def summary(self) -> str:
        """The memory in words, and what its commit passes attended to."""
        return f"{summary(self.memory, self.story.fps)}\ncommit pass attends to: {self.made.commit_attends}"

    def _latents(self, on_chunk: Callable[[int, str], None]) -> Iterator[Tensor]:
        """The chunks of the video so far, then every new one as soon as it is kept."""
        yield from self.memory.latent_chunks
        began, kept = time.monotonic(), self.finished
        for number, memory in enumerate(self.pipeline.generate(self.story, self.memory, self.options, kept), 1):
            new_chunks = memory.latent_chunks[len(self.memory.latent_chunks) :]
            self.memory = memory
            if self.journal:
                self.journal.keep(number - 1, new_chunks[-1])
            num_frames = max(0, number - len(kept)) * memory.config.chunk * FRAMES_PER_LATENT
            slots = ", ".join(f"{len(frames)} {part}" for part, frames in remembered_parts(memory).items())
            on_chunk(number, f"{num_frames / max(1e-6, time.monotonic() - began):.1f} frames/s  memory: {slots}")
            yield from new_chunks


@contextlib.contextmanager
def open_job(request: GenerateRequest, load: Load | None = None) -> Iterator[GenerateJob]:
    """Read, check and load all that a request names, and reserve its output until the end of the block.

    Raises ValueError, one line, for anything that cannot work; then nothing is written.
    """
    request.check()
    like = None if request.like is None else read_provenance(request.like)
    request = request if like is None else request.filled(like)
    options = SamplerOptions(
        attention=request.attention or "sdpa",
        commit_attends=request.commit_attends,
        kv_placement=request.kv_placement,
        kv_dtype=request.kv_dtype or "auto",
    )
    student = request.student.open()
    card = student.card
    story = _story(request, card, like)
    where = pick_device(request.device, request.dtype)
    with joined(where[0]) as processes, _held(request, processes):
        captions = [reference.prompt for reference in story.references if reference.prompt]
        prompts = captions + [segment.prompt for segment in story.segments]
        codecs = backbone_of(card.base).load_codecs(
            *where, prompts, text_encoder=request.text_encoder, vae=request.vae, decoder=request.decoder,
            encodes=bool(request.start or story.references), models_dir=request.models_dir,
        )  # fmt: skip
        pipeline = (load or Pipeline.load)(student, *where, codecs, request.offload)
        load_attention(request.attention or "sdpa", *where, pipeline.network.head_dim)
        if processes:
            pipeline = dataclasses.replace(pipeline, network=pipeline.network.shared_by(processes))
        if like is not None and like.student != pipeline.fingerprint:
            both = f"was made by {like.student} ({like.student_file}), this student is {pipeline.fingerprint}"
            raise ValueError(one_line(f"--student: give that of {request.like}; it {both}"))
        use_cpu_threads(pipeline.network.net)
        memory = _memory(request, pipeline, story, like)
        if processes:
            memory.check_supports("several processes")
        if options.kv_dtype != "auto":
            memory.check_supports("eight bits")
        resolved = story.resolve(card, memory)
        if request.compact:
            memory.check_supports("compact")
        if request.start is not None:
            memory = memory.with_start_latents(pipeline.encode_file(request.start, memory, resolved.fps))
        references = [pipeline.encode_reference(spec, memory, resolved.fps) for spec in story.references]
        pinned = memory.with_references(references) if references else memory
        commit_attends = options.commit_attends or resolved.commit_attends
        scale = request.scale or default_scale(*resolved.size)
        made = _provenance(request, pipeline, story, memory.config, commit_attends, scale)
        if like is not None and (differences := like.differences(made)):
            log.warning("%s", not_the_same(differences))
        say_what_fits(pipeline.network, pinned, options.kv_placement, options.kv_dtype)
        inputs = journal_inputs(pipeline, story, memory, references, made, request.loras)
        folder, num_chunks = journal_path(request.output), resolved.num_chunks
        journal = None
        if processes is None or processes.is_main:
            journal = Journal(folder, inputs, request.resume, num_chunks=num_chunks, shape=memory.chunk_shape)
        finished = journal.finished if journal else []
        yield GenerateJob(
            request=request, pipeline=pipeline, options=options, story=resolved, scale=scale, memory=pinned,
            journal=journal, finished=processes.share(finished) if processes else finished, made=made,
        )  # fmt: skip


@contextlib.contextmanager
def _held(request: GenerateRequest, processes: Processes | None) -> Iterator[None]:
    """The output is reserved for the process that writes it.

    Raises ValueError for files with keys and values: each of several processes has a part of the heads.
    """
    if processes and request.memory_out is not None and not request.compact:
        raise ValueError("--memory-out: keys and values are divided over the processes; give --compact")
    with hold_output(request.output) if processes is None or processes.is_main else contextlib.nullcontext():
        yield


def _story(request: GenerateRequest, card: StudentCard, like: Provenance | None) -> Story:
    """The story of a request, its references with the paths that the user gave. Raises ValueError, one line."""
    if like is not None:
        pictures = zip(like.story.references, request.references)
        references = tuple(dataclasses.replace(spec, image=str(path)) for spec, path in pictures)
        story = dataclasses.replace(like.story, references=references)
    else:
        assert request.story is not None, "check"
        story = read_story(request.story, card.fps, card.memory.chunk)
    return story if request.seed is None else story.with_seed(request.seed)


def _memory(request: GenerateRequest, pipeline: Pipeline, story: Story, like: Provenance | None) -> Memory:
    """The memory that a video begins from. Raises ValueError, one line, for settings that it cannot have."""
    trained = pipeline.card.memory
    settings = request.memory_settings(trained)
    if request.memory is None and like is not None and request.memory_in is None:
        if (window := like.memory.window) > trained.window:
            raise ValueError(f"window: {request.like} has {window} frames, the student {trained.window}; give --memory")
        settings = dataclasses.asdict(like.memory) | settings
    if request.memory_in is None:
        memory = pipeline.empty_memory(story.size, **settings)
        if "policy" in request.settings and not (memory.config.slow or memory.config.per_layer):
            log.warning("--policy: %s has no effect, this memory has no slow frames; give --slow", memory.config.policy)
        return memory
    memory = load_memory(request.memory_in, pipeline.fingerprint)
    if pipeline.network.processes and not memory.is_compact:
        problem = f"--memory-in: {request.memory_in} has keys and values of all heads"
        raise ValueError(f"{problem}; several processes read one that was written with --compact")
    for name, value in settings.items():
        if (own := getattr(memory.config, name)) != value:
            raise ValueError(f"{name}: {value} requested, the memory has {own}; a memory keeps its settings")
    return memory


def _provenance(
    request: GenerateRequest,
    pipeline: Pipeline,
    story: Story,
    memory: MemoryConfig,
    commit_attends: str,
    scale: int,
) -> Provenance:
    """What makes the video of a request, with the options in effect."""
    student, network = request.student, pipeline.network
    at = lambda path: None if path is None else GivenFile.of(path)
    name_of = lambda path: "" if path is None else Path(path).name
    return Provenance(
        revision=git_revision(),
        machine=machine_of(pipeline.device, network.processes.count if network.processes else 1),
        libraries=libraries(request.attention or "sdpa"),
        device=pipeline.device.type,
        dtype=name_of_dtype(network.dtype),
        attention=request.attention or "sdpa",
        student_file=name_of(student.path or BUILT_IN),
        student=pipeline.fingerprint,
        weights=student.weights,
        published=student.card,
        overrides=student.overrides,
        loras=tuple(GivenFile.of(path, f"{path.name}:{strength:g}") for path, strength in student.loras),
        card=pipeline.card,
        text_encoder=pipeline.text_encoder.name,
        text_encoder_file=name_of(request.text_encoder),
        codec=fingerprint(pipeline.vae),
        vae_file=name_of(request.vae),
        decoder_file=name_of(request.decoder),
        memory=memory,
        commit_attends=commit_attends,
        kv_dtype=request.kv_dtype or "auto",
        scale=scale,
        start=at(request.start),
        memory_in=at(request.memory_in),
        references=tuple(GivenFile.of(spec.image) for spec in story.references),
        story=story.without_folders(),
    )
