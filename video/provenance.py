"""What made a video: written into the tags of its file, read from them, and compared."""

import contextlib
import dataclasses
import hashlib
import json
import os
import platform
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from ..memory.config import MemoryConfig
from ..memory.fields import MAX_MESSAGE, checked_fields, json_object, one_line, printable, quoted
from ..model.attention import BACKENDS
from ..model.config import StudentCard
from .mp4 import check_scale
from .reading import ffmpeg_version, read_tags
from .story import Story, parse_story, plain_story

ROOT = Path(__file__).parents[1]

TAG = "context_forcing"
"""The tag of an mp4 that says what made it, as JSON."""
GRAPH_TAGS = ("workflow", "prompt")
"""The tags of a video that ComfyUI made."""
IN_COMFYUI = "made in ComfyUI, its graph is in the file; drop the file on ComfyUI's page to open the graph"
MAX_TEXT = 200
"""Characters of a name or a setting in a tag."""


def git_revision() -> str:
    """The revision of the code, with `+` if the working tree differs from it; `unknown` outside a checkout."""
    if not (ROOT / ".git").exists():  # The folder may lie in the checkout of another project.
        return "unknown"
    try:
        revision = _git("describe", "--always", "--abbrev=12", "--exclude=*")
        changes = _git("status", "--porcelain", "--untracked-files=no")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return revision + ("+" if changes else "")


def _git(*arguments: str) -> str:
    """What git prints. It takes no lock: killed, or on a full disk, it would leave one in the checkout."""
    command = ["git", "--no-optional-locks", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()


def machine_of(device: torch.device, num_processes: int = 1) -> str:
    """The class of machine whose arithmetic a video depends on: the GPU, or the CPU with torch's threads."""
    processes = f", {num_processes} processes" if num_processes > 1 else ""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device) + processes
    capability = torch.backends.cpu.get_cpu_capability()
    return f"{platform.machine()} {capability}, threads {torch.get_num_threads()}{processes}"


def version_of(package: str) -> str:
    """The version of an installed package."""
    try:
        return version(package)
    except PackageNotFoundError:
        return "of unknown version"


def libraries(attention: str) -> str:
    """The versions of torch, ffmpeg and an attention's package, and the cores that ffmpeg's encoder uses."""
    named = [f"torch {torch.__version__}", f"ffmpeg {ffmpeg_version()}", f"cores {os.cpu_count()}"]
    if attention in BACKENDS:
        named.append(f"{BACKENDS[attention].package} {version_of(BACKENDS[attention].package)}")
    return ", ".join(named)


@dataclass(frozen=True, kw_only=True)
class GivenFile:
    """A file that made a video. The video has its name and digest, not its folder and not the file."""

    name: str
    sha256: str

    @classmethod
    def of(cls, path: str | Path, name: str = "") -> "GivenFile":
        """The file at a path. Raises ValueError if it cannot be read."""
        sha = hashlib.sha256()
        try:
            with Path(path).open("rb") as file:
                while block := file.read(2**20):
                    sha.update(block)
        except OSError as error:
            raise ValueError(f"{path}: cannot be read ({error.strerror})") from None
        return cls(name=name or Path(path).name, sha256=sha.hexdigest())

    def __str__(self) -> str:
        return f"{self.name} (SHA-256 {self.sha256[:12]})"


@dataclass(frozen=True, kw_only=True)
class Provenance:
    """All that the frames of a video depend on. Files are named, not held; offloading and kv_placement change none."""

    revision: str
    """Of the code."""
    machine: str
    libraries: str
    device: str
    dtype: str
    attention: str
    student_file: str
    student: str
    """Fingerprint of its weights without LoRAs."""
    weights: str
    """How the student's file was read: the options --weights, --card and --set."""
    published: str
    overrides: tuple[str, ...]
    loras: tuple[GivenFile, ...]
    """Their names end in the strength."""
    card: StudentCard
    """The card in effect."""
    text_encoder: str
    """Fingerprint, or the name of a built-in one."""
    text_encoder_file: str
    """As the user named it; empty if it was found."""
    codec: str
    """Fingerprint of the VAE."""
    vae_file: str
    memory: MemoryConfig
    commit_attends: str
    scale: int
    start: GivenFile | None
    memory_in: GivenFile | None
    references: tuple[GivenFile, ...]
    """The pictures of the story's references, in their order."""
    kv_dtype: str = "auto"
    """How sink and slow frames were stored."""
    decoder_file: str = ""
    """The tiny decoder, whose fingerprint is `codec`; empty if the VAE decoded."""
    story: Story
    """With the seeds in effect; its pictures are names without folders."""

    def tags(self) -> dict[str, str]:
        """The tags for the file of the video."""
        return {TAG: json.dumps({**dataclasses.asdict(self), "story": plain_story(self.story)})}

    @classmethod
    def from_json(cls, text: str) -> "Provenance":
        """What a tag says. Raises ValueError unless every value is one that `tags` can write."""
        raw = checked_fields(cls, json_object(text, TAG), TAG)
        values: dict[str, Any] = {
            "overrides": tuple(_text("overrides", each) for each in _list("overrides", raw["overrides"])),
            **{name: tuple(_file(name, each) for each in _list(name, raw[name])) for name in ("loras", "references")},
            **{name: None if raw[name] is None else _file(name, raw[name]) for name in ("start", "memory_in")},
            "card": StudentCard.from_json(json.dumps(raw["card"])),
            "memory": MemoryConfig.from_dict(raw["memory"]),
            "story": parse_story(raw["story"]),
            "scale": raw["scale"],
        }
        values |= {name: _text(name, raw[name]) for name in raw if name not in values}
        made = cls(**values)
        if type(made.scale) is not int:
            raise ValueError(f"scale: {quoted(made.scale)} is not a whole number")
        check_scale("scale", made.scale)
        if len(made.references) != len(made.story.references):
            raise ValueError(f"references: {len(made.references)} digests, the story has {len(made.story.references)}")
        return made

    def differences(self, other: "Provenance") -> list[str]:
        """The fields in which another video was made differently; short ones with both values."""
        found = []
        for name in (field.name for field in dataclasses.fields(self)):
            mine, others = getattr(self, name), getattr(other, name)
            if mine != others:
                both = f" ({mine}, here {others})"
                found.append(name + (both if isinstance(mine, (str, int)) and len(both) <= MAX_TEXT // 2 else ""))
        return found

    def rows(self) -> list[tuple[str, str]]:
        """Name and value of what a reader wants to know, the segments of the story last."""
        story, card, memory = self.story, self.card, self.memory
        encoder, vae = (printable(text) for text in (self.text_encoder_file, self.vae_file))
        seeds = "" if all(each.seed is None for each in story.segments) else ", some segments have their own"
        rows = [
            ("made by", f"context_forcing, revision {self.revision}"),
            ("student", f"{self.student_file}, fingerprint {self.student}"),
            ("read as", f"weights {self.weights}, card {self.published} {' '.join(self.overrides)}"),
            ("card", f"{card.name}, base {card.base}, steps {list(card.steps)}, shift {card.shift:g}, {card.solver}"),
            *(("LoRA", str(each)) for each in self.loras),
            ("text encoder", " ".join(filter(None, (encoder, self.text_encoder)))),
            ("VAE", " ".join(filter(None, (vae, self.codec)))),
            *((name, printable(file)) for name, file in (("decoder", self.decoder_file),) if file),
            ("memory", ", ".join(f"{name} {value}" for name, value in dataclasses.asdict(memory).items())),
            ("commit pass attends to", self.commit_attends),
            *((name, printable(kind)) for name, kind in (("sink and slow in", self.kv_dtype),) if kind != "auto"),
            *((name, str(file)) for name, file in (("start", self.start), ("memory in", self.memory_in)) if file),
            ("machine", f"{self.device} in {self.dtype}, {self.attention}, {self.machine}"),
            ("libraries", self.libraries),
            ("size", f"{list(story.size or card.size)}, {story.fps or card.fps} fps, enlarged {self.scale} times"),
            ("seed", f"{story.seed}{seeds}"),
            *(("reference", f"{file} {spec.prompt}") for file, spec in zip(self.references, story.references)),
        ]
        for segment in story.segments:
            seed = "" if segment.seed is None else f", seed {segment.seed}"
            blend = f", blend {segment.blend}" if segment.blend else ""
            rows.append((f"{segment.seconds:g} s, {segment.change}{blend}{seed}", segment.prompt))
        return [(name, printable(value).strip()) for name, value in rows]


def read_provenance(video: Path) -> Provenance:
    """What made a video of `context-forcing generate`. Raises ValueError, one line of at most 300 characters."""
    with _one_line(video):
        tags = read_tags(video)
        if TAG in tags:
            return Provenance.from_json(tags[TAG])
        if any(name in tags for name in GRAPH_TAGS):
            raise ValueError(f"{IN_COMFYUI}, and make the video there")
        raise ValueError(f"has no tag {TAG}; only videos of `context-forcing generate` say what made them")


def describe(video: Path) -> list[tuple[str, str]]:
    """Names and values for a reader of what made a video. Raises ValueError, one line of at most 300 characters."""
    with _one_line(video):
        tags = read_tags(video)
    if TAG not in tags and any(name in tags for name in GRAPH_TAGS):
        return [("made by", IN_COMFYUI)]
    return read_provenance(video).rows()


@contextlib.contextmanager
def _one_line(video: Path) -> Iterator[None]:
    try:
        yield
    except (ValueError, TypeError, LookupError, AttributeError, ArithmeticError, RecursionError) as error:
        name = str(video) if len(str(video)) <= MAX_MESSAGE // 3 else f"...{str(video)[-MAX_MESSAGE // 3 :]}"
        raise ValueError(one_line(f"{name}: {error}")) from None


def not_the_same(differences: list[str]) -> str:
    """One line that says in which fields a video is not made as the one before was."""
    return one_line(f"--like: not the same as then: {', '.join(differences)}")


def _text(name: str, raw: object) -> str:
    if not isinstance(raw, str) or len(raw) > MAX_TEXT:
        raise ValueError(f"{name}: not a text of at most {MAX_TEXT} characters")
    return raw


def _list(name: str, raw: object) -> list[Any] | tuple[Any, ...]:
    if not isinstance(raw, (list, tuple)):
        raise ValueError(f"{name}: not a list")
    return raw


def _file(name: str, raw: object) -> GivenFile:
    values = checked_fields(GivenFile, raw, name)
    return GivenFile(**{key: _text(f"{name}.{key}", value) for key, value in values.items()})
