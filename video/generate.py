"""Generation of a video file from a story. Everything is checked before work begins, and finished chunks are kept."""

import contextlib
import dataclasses
import logging
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor

from ..memory.config import named_memory
from ..memory.fields import brief
from ..memory.files import check_writable
from ..memory.history import remembered_parts
from ..memory.memory import Memory
from ..memory.snapshot import fingerprint_memory, fingerprint_references, load_memory, save_memory
from ..model.attention import load_attention
from ..model.checkpoints.student import DEMO_STUDENT, StudentSource
from ..model.codecs.backbone import backbone_of
from ..model.config import StudentCard
from ..model.device import is_out_of_memory, pick_device, use_cpu_threads
from ..model.fingerprint import fingerprint
from ..model.sampler import SamplerOptions
from ..model.units import FRAMES_PER_LATENT
from .frames import save_picture, thumbnails
from .journal import Journal, journal_path
from .mp4 import default_scale, hold_output, write_video
from .pipeline import Pipeline
from .provenance import tags_of
from .report import draw_report, summary
from .story import ResolvedStory, Story
from .storyboard import read_story

log = logging.getLogger("context_forcing")


@dataclass(frozen=True, kw_only=True)
class GenerateRequest:
    """What to generate, from which files, and where to write it: the options of `context-forcing generate`."""

    story: Path
    output: Path
    student: StudentSource
    loras: tuple[str, ...] = ()
    """The LoRAs of the student as the user wrote them, for the journal."""
    text_encoder: str | None = None
    vae: str | None = None
    models_dir: Path | None = None
    seed: int | None = None
    memory: str | None = None
    settings: Mapping[str, object] = field(default_factory=dict)
    """Fields of the memory's configuration that replace its own."""
    device: str = "auto"
    dtype: str = "auto"
    offload: bool = False
    attention: str = "sdpa"
    commit_attends: str | None = None
    """What the commit pass attends to; None: as the story, or else the student's card, says."""
    kv_placement: str = "at once"
    memory_in: Path | None = None
    memory_out: Path | None = None
    compact: bool = False
    start: Path | None = None
    resume: bool = False
    report: Path | None = None
    scale: int | None = None

    def check_paths(self) -> None:
        """Raises ValueError if a file cannot be written where it is requested."""
        for option, path in (("--memory-out", self.memory_out), ("--report", self.report)):
            if path is not None:
                check_writable(option, path)
        if self.report is not None and self.report.suffix.lower() != ".png":
            raise ValueError(f"--report: {self.report} does not end in .png; give a name that does")
        if self.compact and self.memory_out is None:
            raise ValueError("--compact: there is no --memory-out that it applies to; give one")
        if self.memory_out and self.memory_in and self.memory_out.resolve() == self.memory_in.resolve():
            raise ValueError(f"--memory-out: {self.memory_out} is --memory-in; give another file, --resume needs both")


@dataclass(kw_only=True)
class GenerateJob:
    """A video that is ready to be generated."""

    request: GenerateRequest
    pipeline: Pipeline
    options: SamplerOptions
    story: ResolvedStory
    memory: Memory
    """The memory after the last finished chunk."""
    journal: Journal
    tags: Mapping[str, str]
    """What made the video, for its file (provenance.tags_of)."""
    is_whole: bool = False
    """Whether the video is written. Memory and report may not be."""

    def run(self, on_chunk: Callable[[int, str], None] = lambda finished, note: None) -> int:
        """Generate, decode and write the video. Returns its number of pixel frames.

        `on_chunk` is called after every chunk with the number of finished chunks and a note on speed and memory. After
        an error or an interrupt `memory_out` holds what is finished, and the journal can be resumed. Raises ValueError
        for files that cannot be written, and if memory is at its end.
        """
        request, story = self.request, self.story
        scale = request.scale or default_scale(*story.size)
        try:
            pixels = self.pipeline.decode(self._latents(on_chunk))
            num_frames = write_video(request.output, pixels, fps=story.fps, scale=scale, metadata=self.tags)
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
            kept = "the finished chunks are kept: --resume with" if self.journal.has_chunks else "give"
            return ValueError(f"out of memory ({brief(error)}); {kept} --offload or --kv-placement 'from RAM'")
        return error

    @property
    def summary(self) -> str:
        """The memory in words, and what its commit passes attended to."""
        attends = self.options.commit_attends or self.story.commit_attends
        return f"{summary(self.memory, self.story.fps)}\ncommit pass attends to: {attends}"

    def _latents(self, on_chunk: Callable[[int, str], None]) -> Iterator[Tensor]:
        """The chunks of the video so far, then every new one as soon as it is kept."""
        yield from self.memory.latent_chunks
        began, kept = time.monotonic(), self.journal.finished
        for number, memory in enumerate(self.pipeline.generate(self.story, self.memory, self.options, kept), 1):
            new_chunks = memory.latent_chunks[len(self.memory.latent_chunks) :]
            self.memory = memory
            self.journal.keep(number - 1, new_chunks[-1])
            num_frames = max(0, number - len(kept)) * memory.config.chunk * FRAMES_PER_LATENT
            slots = ", ".join(f"{len(frames)} {part}" for part, frames in remembered_parts(memory).items())
            on_chunk(number, f"{num_frames / max(1e-6, time.monotonic() - began):.1f} frames/s  memory: {slots}")
            yield from new_chunks


@contextlib.contextmanager
def open_job(request: GenerateRequest) -> Iterator[GenerateJob]:
    """Read, check and load all that a request names, and reserve its output until the end of the block.

    Raises ValueError, one line, for anything that cannot work; then nothing is written.
    """
    request.check_paths()
    options = SamplerOptions(
        attention=load_attention(request.attention),
        commit_attends=request.commit_attends,
        kv_placement=request.kv_placement,
    )
    student = request.student.open()
    card = student.card
    story = read_story(request.story, card.fps, card.memory.chunk)
    story = story if request.seed is None else story.with_seed(request.seed)
    with hold_output(request.output):
        where = pick_device(request.device, request.dtype)
        captions = [reference.prompt for reference in story.references if reference.prompt]
        prompts = captions + [segment.prompt for segment in story.segments]
        codecs = backbone_of(card.base).load_codecs(
            *where, prompts, text_encoder=request.text_encoder, vae=request.vae, models_dir=request.models_dir
        )
        pipeline = Pipeline.load(student, *where, codecs, request.offload)
        use_cpu_threads(pipeline.network.net)
        preset = {} if request.memory is None else dataclasses.asdict(named_memory(request.memory, card.memory))
        settings = preset | dict(request.settings)
        if request.memory_in is not None:
            memory = load_memory(request.memory_in, pipeline.fingerprint)
            for name, value in settings.items():
                if (own := getattr(memory.config, name)) != value:
                    raise ValueError(f"{name}: {value} requested, the memory has {own}; a memory keeps its settings")
        else:
            memory = pipeline.empty_memory(story.size, **settings)
        resolved = story.resolve(card, memory)
        if request.compact:
            memory.check_supports("compact")
        if request.start is not None:
            memory = memory.with_start_latents(pipeline.encode_file(request.start, memory, resolved.fps))
        references = [pipeline.encode_reference(spec, memory, resolved.fps) for spec in story.references]
        pinned = memory.with_references(references) if references else memory
        inputs = {
            "student": pipeline.merged_fingerprint,
            "text encoder": pipeline.text_encoder.name,
            "codec": fingerprint(pipeline.vae),
            "device": pipeline.device.type,
            "dtype": str(pipeline.network.dtype),
            "loras": request.loras,
            "story": _journal_fields(story),
            "card": _journal_fields(card),
            "memory": fingerprint_memory(memory),
        }
        # Only if they are not the defaults: older journals do not have them.
        inputs |= {"attention": request.attention} if request.attention != "sdpa" else {}
        commit_attends = options.commit_attends or resolved.commit_attends
        inputs |= {"commit attends": commit_attends} if commit_attends != "all" else {}
        inputs |= {"references": fingerprint_references(references)} if references else {}
        folder, num_chunks = journal_path(request.output), resolved.num_chunks
        journal = Journal(folder, inputs, request.resume, num_chunks=num_chunks, shape=memory.chunk_shape)
        # Videos are published: names of files, not their folders.
        file, loras = Path(request.student.path or DEMO_STUDENT).name, [Path(lora).name for lora in request.loras]
        tags = tags_of({"student file": file, "seed": story.seed, **inputs, "loras": loras})
        yield GenerateJob(
            request=request, pipeline=pipeline, options=options, story=resolved, memory=pinned, journal=journal,
            tags=tags,
        )  # fmt: skip


def _journal_fields(value: Story | StudentCard) -> dict:
    """The fields of a story or card in a journal. What is in effect of the others is an input of its own.

    Older journals do not have match_sink; it is written if it has an effect.
    """
    fields = dataclasses.asdict(value)
    others = {"commit_attends", "references"} | ({"match_sink"} if not fields.get("match_sink") else set())
    return {name: field for name, field in fields.items() if name not in others}
