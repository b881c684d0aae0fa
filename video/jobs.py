"""Jobs files: stories x students x seeds, each a video of `context-forcing generate` (docs/command_line.md, batch)."""

import dataclasses
import math
import re
import string
import types
import typing
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..memory.config import MemoryConfig
from ..memory.fields import brief, checked_fields, one_line, quoted
from ..memory.files import read_text
from ..model.attention import check_attention_name
from ..model.checkpoints.locate import BUILT_IN, default_models_dir, locate_student
from ..model.checkpoints.student import StudentFile, StudentSource
from ..model.codecs.backbone import Codecs
from ..model.config import StudentCard
from ..model.device import COMPUTE_DTYPES, dtype_named
from ..model.sampler import SamplerOptions, chunks_for
from ..model.settings import read_yaml
from ..model.units import FRAMES_PER_LATENT
from ..workers.job import Loaded
from .generate import GenerateRequest, open_job
from .journal import has_journal, num_kept
from .mp4 import check_scale
from .pipeline import Pipeline
from .provenance import Provenance, read_provenance
from .story import MAX_SEED, Story
from .storyboard import read_story

MAX_JOBS = 100_000
SETTINGS = {"policy": ("policy", str), "slow": ("slow", int), "threshold": ("slow_similarity_threshold", float)}
"""Options of `generate` that are fields of the memory's configuration, with their type."""
OF_EACH_JOB = {"story", "like", "output", "student", "loras", "seed", "settings", "references", "resume", "device"}
OF_ONE_VIDEO = {"memory_out", "compact", "report"}
OPTIONS: dict[str, Any] = {
    **{name: kind for name, (_, kind) in SETTINGS.items()},
    **{
        name: kind
        for name, kind in typing.get_type_hints(GenerateRequest).items()
        if name not in OF_EACH_JOB | OF_ONE_VIDEO
    },
}
"""The options of `generate` that hold for all jobs of a file, with their type."""
PLACES = ("story", "student", "seed", "number")
"""What the pattern of the outputs can have in braces."""
WIDTH = re.compile(r"\d{1,2}d?", re.ASCII)
"""What can follow a colon in braces; a larger width would be a name of any size."""


@dataclass(frozen=True, kw_only=True)
class StudentSpec:
    """A student as a jobs file names it; the fields are options of `generate`."""

    file: str = BUILT_IN
    name: str = ""
    """Its name in the outputs; empty: that of the file."""
    weights: str = "auto"
    card: str = "auto"
    set: tuple[str, ...] = ()
    lora: tuple[str, ...] = ()

    def __post_init__(self):
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            parts = value if isinstance(value, tuple) else (value,)
            if (isinstance(value, tuple) != (field.type == tuple[str, ...])) or not all(
                isinstance(part, str) for part in parts
            ):
                kind = "text" if field.type is str else "a list of texts"
                raise ValueError(f"{field.name}: {quoted(value)} is not {kind}")


@dataclass(frozen=True, kw_only=True)
class JobsFile:
    """A jobs file as it is written."""

    output: str
    stories: tuple[str, ...]
    students: tuple[StudentSpec, ...] = (StudentSpec(),)
    seeds: tuple[int | None, ...] = (None,)
    """None: the story's own."""
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class VideoJob:
    """One video of a jobs file; its steps are chunks."""

    request: GenerateRequest
    num_chunks: int
    chunk_frames: int
    """Pixel frames of a chunk."""
    is_made: bool
    """Whether the video was whole before this run."""

    @property
    def output(self) -> Path:
        return self.request.output

    @property
    def name(self) -> str:
        return str(self.output)

    def num_kept(self) -> int:
        """Chunks in its journal."""
        return num_kept(self.output)

    def run(self, loaded: Loaded) -> int:
        """Make the video, or finish it if it has a journal; returns its number of frames."""

        def load(
            student: StudentFile, device: torch.device, dtype: torch.dtype, codecs: Codecs, offload: bool
        ) -> Pipeline:
            """Pipeline.load, or the student of the video before with other codecs."""
            key = (student.source, device, dtype, offload)
            pipeline = loaded.get(key, lambda: Pipeline.load(student, device, dtype, codecs, offload))
            return dataclasses.replace(pipeline, text_encoder=codecs.text_encoder, vae=codecs.vae)

        with open_job(dataclasses.replace(self.request, resume=has_journal(self.output)), load) as job:
            return job.run()


def read_jobs(path: Path, device: str = "auto") -> list[VideoJob]:
    """All videos of a jobs file, those of one student after each other.

    Paths in the file are relative to its folder. Raises ValueError, one line, for anything that cannot work.
    """
    text = read_text(path)
    try:
        file = parse_jobs(read_yaml(text))
        return list(_jobs(file, path.absolute().parent, device))
    except OSError as error:
        raise ValueError(f"{path}: {error.filename or path}: cannot be read ({error.strerror})") from None
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def parse_jobs(raw: object) -> JobsFile:
    """A jobs file from plain values. Raises ValueError."""
    values = checked_fields(JobsFile, raw, "jobs")
    if not isinstance(values["output"], str) or not values["output"]:
        raise ValueError(f"output: {quoted(values['output'])} is not a name such as out/{{story}}-{{seed}}.mp4")
    _check_pattern(values["output"])
    for name in ("stories", "students", "seeds"):
        if name in values and not (isinstance(values[name], tuple) and values[name]):
            raise ValueError(f"{name}: {quoted(values[name])} is not a list with at least one entry")
    for i, story in enumerate(values["stories"]):
        if not isinstance(story, str):
            raise ValueError(f"stories[{i}]: {quoted(story)} is not the path of a story")
    for i, seed in enumerate(values.get("seeds", ())):
        if type(seed) is not int or not 0 <= seed <= MAX_SEED:
            raise ValueError(f"seeds[{i}]: {quoted(seed)} is not a whole number from 0 to {MAX_SEED}")
    if "students" in values:
        values["students"] = tuple(_student(f"students[{i}]", each) for i, each in enumerate(values["students"]))
    return JobsFile(**{**values, "options": _options(values.get("options", {}))})


def _check_pattern(pattern: str) -> None:
    try:
        parts = [part[1:3] for part in string.Formatter().parse(pattern) if part[1] is not None]
    except ValueError as error:
        raise ValueError(f"output: {quoted(pattern)}: {error}") from None
    if unknown := [name for name, _ in parts if name not in PLACES]:
        known = ", ".join(f"{{{name}}}" for name in PLACES)
        raise ValueError(f"output: {{{brief(unknown[0])}}} is not one of {known}")
    if wrong := [spec for _, spec in parts if spec and not WIDTH.fullmatch(spec)]:
        raise ValueError(f"output: {quoted(wrong[0])} is not a width; write {{seed:04}} for four digits")
    if not pattern.lower().endswith(".mp4"):
        raise ValueError(f"output: {quoted(pattern)} does not end in .mp4; give a name that does")


def _student(where: str, raw: object) -> StudentSpec:
    try:
        return StudentSpec(**checked_fields(StudentSpec, {"file": raw} if isinstance(raw, str) else raw, ""))
    except ValueError as error:
        raise ValueError(f"{where}.{str(error).removeprefix('.')}") from None


def _options(raw: object) -> dict[str, Any]:
    known = ", ".join(sorted(OPTIONS))
    if not isinstance(raw, Mapping):
        raise ValueError(f"options: {quoted(raw)} is not a mapping; known options are {known}")
    for name, value in raw.items():
        if name not in OPTIONS:
            raise ValueError(f"options.{brief(name)}: unknown option; known are {known}")
        kinds = _kinds(OPTIONS[name])
        fits = any(type(value) is kind or (kind is float and type(value) is int) for kind in kinds)
        if not fits or (isinstance(value, float) and not math.isfinite(value)):
            names = {str: "text", int: "a whole number", float: "a number", bool: "true or false"}
            raise ValueError(f"options.{name}: {quoted(value)} is not {' or '.join(names[kind] for kind in kinds)}")
    return dict(raw)


def _kinds(hint: Any) -> list[Any]:
    """The types that YAML has for a type of a request."""
    parts = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    return [str if part is Path else part for part in parts if part is not type(None)]


def _jobs(file: JobsFile, folder: Path, device: str) -> Iterable[VideoJob]:
    options: dict[str, Any] = {
        name: folder / value if Path in typing.get_args(OPTIONS[name]) else _beside(folder, str(value))
        if name in ("text_encoder", "vae", "decoder") else value
        for name, value in file.options.items()
    }  # fmt: skip
    settings = {SETTINGS[name][0]: options.pop(name) for name in SETTINGS if name in options}
    models_dir = options["models_dir"] = default_models_dir(options.get("models_dir"))
    SamplerOptions(
        commit_attends=options.get("commit_attends"),
        kv_placement=options.get("kv_placement", "at once"),
        kv_dtype=options.get("kv_dtype", "auto"),
    )
    # A worker on another machine can have packages that this one has not: only the name is checked.
    check_attention_name(options.get("attention", "sdpa"))
    if options.get("dtype", "auto") != "auto":
        dtype_named(options["dtype"], COMPUTE_DTYPES)
    check_scale("options.scale", options.get("scale", 1))
    names: dict[Path, str] = {}
    number = 0
    if (count := len(file.stories) * len(file.students) * len(file.seeds)) > MAX_JOBS:
        raise ValueError(f"{count} videos are too many; give stories, students and seeds for {MAX_JOBS} at most")
    for i, spec in enumerate(file.students):
        try:
            located = locate_student(spec.file if spec.file == BUILT_IN else _beside(folder, spec.file), models_dir)
            loras = tuple(_beside(folder, lora) for lora in spec.lora)
            source = StudentSource.parse(located, spec.weights, spec.card, spec.set, loras)
            student = source.open()
        except ValueError as error:
            raise ValueError(f"students[{i}]: {error}") from None
        for name in file.stories:
            own = read_story(folder / name, student.card.fps, student.card.memory.chunk)
            for seed in file.seeds:
                number += 1
                story = own if seed is None else own.with_seed(seed)
                values = {"story": Path(name).stem, "student": spec.name or Path(spec.file).stem}
                output = folder / file.output.format(**values, seed=story.seed, number=number)
                label = f"{name}, {spec.file}, seed {story.seed}"
                if output in names:
                    raise ValueError(f"output: {output} is the name of two videos, {names[output]} and {label}; add"
                                     " {story}, {student}, {seed} or {number} to the pattern")  # fmt: skip
                names[output] = label
                request = GenerateRequest(
                    story=folder / name, output=output, student=source, loras=loras, seed=seed, settings=settings,
                    device=device, **options,
                )  # fmt: skip
                yield _job(request, student, story)


def _beside(folder: Path, name: str) -> str:
    """A file beside the jobs file, or the name as it is, which is looked for in ComfyUI's models folder."""
    file = name.rpartition(":")[0] or name
    is_there = (folder / name).exists() or (folder / file).exists()
    return str(folder / name) if is_there else name


def _job(request: GenerateRequest, student: StudentFile, story: Story) -> VideoJob:
    card, output = student.card, request.output
    fps, chunk = story.fps or card.fps, card.memory.chunk
    memory = dataclasses.replace(card.memory, **request.memory_settings(card.memory))
    is_made = output.exists() and not has_journal(output)
    if is_made and (differences := _differences(read_provenance(output), request, card, story, memory)):
        names = ", ".join(differences)
        raise ValueError(one_line(f"output: {output} was made with another {names}; delete it, or change `output`"))
    return VideoJob(
        request=request,
        num_chunks=sum(chunks_for(segment.seconds, fps, chunk) for segment in story.segments),
        chunk_frames=chunk * FRAMES_PER_LATENT,
        is_made=is_made,
    )


def _differences(
    made: Provenance, request: GenerateRequest, card: StudentCard, story: Story, memory: MemoryConfig
) -> list[str]:
    """In what a whole video differs from a request, of all that is known without its weights."""
    student = request.student
    name_of = lambda path: "" if path is None else Path(path).name
    given = lambda file: "" if file is None else file.name
    pairs = {
        "story": (made.story, story.without_folders()),
        "student": (made.student_file, name_of(student.path or BUILT_IN)),
        "card": (made.card, card),
        "weights": (made.weights, student.weights),
        "loras": (
            tuple(map(given, made.loras)),
            tuple(f"{path.name}:{strength:g}" for path, strength in student.loras),
        ),
        "attention": (made.attention, request.attention or "sdpa"),
        "commit_attends": (made.commit_attends, request.commit_attends or story.commit_attends or card.commit_attends),
        "kv_dtype": (made.kv_dtype, request.kv_dtype or "auto"),
        "text_encoder": (made.text_encoder_file, name_of(request.text_encoder)),
        "vae": (made.vae_file, name_of(request.vae)),
        "decoder": (made.decoder_file, name_of(request.decoder)),
        "scale": (made.scale, request.scale or made.scale),
        "dtype": (made.dtype, made.dtype if request.dtype == "auto" else request.dtype),
        "start": (given(made.start), name_of(request.start)),
        "memory_in": (given(made.memory_in), name_of(request.memory_in)),
    }
    if request.memory_in is None:
        pairs["memory"] = (made.memory, memory)
    return [name for name, (before, here) in pairs.items() if before != here]
