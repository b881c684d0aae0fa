"""What the drills share: commands that write, how they are started, and what a finished one has made."""

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import yaml
from safetensors import safe_open

from context_forcing.memory.snapshot import load_memory
from context_forcing.train.data.manifest import read_manifest

SOAK = int(os.environ.get("SOAK", "0"))
"""Rounds of every drill in the long form (make soak); 0 for the short form."""
SEED = int(os.environ.get("SOAK_SEED", "0"))
MAX_MESSAGE = 300
STORY = {
    "size": [48, 32], "seed": 4,
    "segments": [
        {"prompt": "a meadow by day, the camera pans right", "seconds": 6},
        {"prompt": "a desert", "seconds": 6, "change": "recache"},
    ],
}  # fmt: skip
JOBS = {
    "output": "out/{story}-{seed}.mp4", "stories": ["story.yaml"], "seeds": [4, 5],
    "students": ["student.safetensors"], "options": {"scale": 1},
}  # fmt: skip
STAGES = {
    "vae": "demo_codec", "pretrain": "student", "teacher": "teacher", "local": "student", "contextual": "student"
}  # fmt: skip
"""Training stages and the stem of the file of each."""


EVALUATE = """
evaluate --student student.safetensors -o out --rollouts 2 --gaps 0 --columns 9 --policies novel,none
"""


class Zygote:
    """tests/faults/zygote.py."""

    def __init__(self):
        self.process = subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("zygote.py"))], stdin=subprocess.PIPE,
            stdout=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"},
        )  # fmt: skip

    def ask(self, **request) -> int:
        assert self.process.stdin and self.process.stdout
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        return int(self.process.stdout.readline())

    def close(self) -> None:
        self.process.kill()
        self.process.communicate()


@dataclass(frozen=True, kw_only=True)
class Ended:
    """How a command ended."""

    status: int
    """Exit code; a signal is negative."""
    stderr: str
    seconds: float

    @property
    def error(self) -> str:
        """The one line of an error."""
        lines = [line for line in self.stderr.splitlines() if line.startswith("error: ")]
        assert len(lines) == 1 and "Traceback" not in self.stderr, self.stderr
        assert len(lines[0]) <= MAX_MESSAGE, lines[0]
        return lines[0]

    @property
    def operations(self) -> int:
        """The number of torch's operations, if they were counted."""
        return int(self.stderr.rpartition("operations ")[2])

    def succeeded(self) -> "Ended":
        assert self.status == 0, self.stderr
        return self


@dataclass
class Started:
    """A command that runs."""

    zygote: Zygote
    pid: int
    folder: Path
    stderr: Path
    began: float = field(default_factory=time.monotonic)

    def send(self, number: int) -> None:
        """A signal; Ctrl-C goes to all that the command has started, as in a terminal.

        A process that has ended waits for `end`, so its id is no other's.
        """
        (os.killpg if number == signal.SIGINT and os.getsid(self.pid) == self.pid else os.kill)(self.pid, number)

    def kill_worker(self) -> bool:
        """End a process that holds a file for this command, if there is one."""
        for lock in self.folder.rglob("*.lock"):
            with contextlib.suppress(OSError):
                holder = re.match(r"pid (\d+) ", lock.read_text())
                if holder and int(holder[1]) != self.pid and os.getsid(int(holder[1])) == self.pid:
                    os.kill(int(holder[1]), signal.SIGKILL)
                    return True
        return False

    def end(self) -> Ended:
        status = os.waitstatus_to_exitcode(self.zygote.ask(wait=self.pid))
        seconds = time.monotonic() - self.began
        return Ended(status=status, stderr=self.stderr.read_text(errors="replace"), seconds=seconds)


@dataclass(frozen=True, kw_only=True)
class Command:
    """A command that writes."""

    arguments: Callable[[Path], Sequence[str]]
    """Of the first time and of every other; it looks into the folder as a user would."""
    made: Callable[[Path], object]
    """All that it makes, for a comparison."""
    same: tuple[str, ...] = ()
    """Files that have their names only when they are finished."""
    readable: Mapping[str, Callable[[Path], object]] = field(default_factory=dict)
    """Other files that are whole at any time, and what reads them."""
    inputs: Mapping[str, str] = field(default_factory=dict)
    """Names in the folder and what is copied there: keys of the fixture `inputs`."""
    tiny: bool = False
    lists_failures: bool = False
    """Whether what cannot be made is listed, with exit code 1, and all else is made."""


def tensors_of(path: Path) -> dict[str, bytes]:
    with safe_open(path, "np") as file:
        return {name: file.get_tensor(name).tobytes() for name in file.keys()}


def metrics_of(run: Path) -> list[dict]:
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in ("seconds", "tokens_per_second", "peak_gb")} for line in lines]


def generate(folder: Path) -> list[str]:
    resume = ["--resume"] if (folder / "film.mp4.journal/journal.json").exists() else []
    options = ["--student", "student.safetensors", "--scale", "1", "--memory-out", "film.memory"]
    return ["generate", "story.yaml", "-o", "film.mp4", *options, *resume]


def train(stage: str) -> Callable[[Path], list[str]]:
    settings = ["steps=6", "batch=1", "sample_every=3", "checkpoint_every=1", "device=cpu", "out=run"]

    def arguments(folder: Path) -> list[str]:
        resume = ["--resume"] if list((folder / "run/checkpoints").glob("step-????????")) else []
        return ["train", stage, "--config", "smoke", *settings, *resume]

    return arguments


def encoded(folder: Path) -> tuple:
    lines = sorted((folder / "set/manifest.jsonl").read_text().replace(str(folder), "").splitlines())
    return lines, {path.name: path.read_bytes() for path in (folder / "set").glob("*.safetensors")}


COMMANDS = {
    "generate": Command(
        arguments=generate,
        made=lambda folder: [(folder / name).read_bytes() for name in ("film.mp4", "film.memory")],
        same=("film.mp4",),
        readable={"film.memory": load_memory},
        inputs={"story.yaml": "story", "student.safetensors": "student"},
    ),
    "batch": Command(
        arguments=lambda folder: ["batch", "jobs.yaml", "--workers", "1", "--device", "cpu"],
        made=lambda folder: [path.read_bytes() for path in sorted((folder / "out").iterdir())],
        same=tuple(f"out/story-{seed}.mp4" for seed in JOBS["seeds"]),
        inputs={"jobs.yaml": "jobs", "story.yaml": "story", "student.safetensors": "student"},
        lists_failures=True,
    ),
    "encode": Command(
        arguments=lambda folder: ["encode", "videos", "-o", "set", "--frames", "4", "--shard-mb", "1"],
        made=encoded,
        readable={"set/manifest.jsonl": lambda path: read_manifest(path.parent)},
        inputs={"videos": "videos"},
    ),
    "convert": Command(
        arguments=lambda folder: ["convert", "big.safetensors", "-o", "c.safetensors", "--dtype", "bf16", "--force"],
        made=lambda folder: (folder / "c.safetensors").read_bytes(),
        same=("c.safetensors",),
        inputs={"big.safetensors": "big student"},
    ),
    "evaluate": Command(
        arguments=lambda folder: EVALUATE.split(),
        made=lambda folder: (folder / "out/recall.json").read_bytes(),
        readable={"out/recall.json": lambda path: json.loads(path.read_text())},
        inputs={"student.safetensors": "world student"},
    ),
    **{
        stage: Command(
            arguments=train(stage),
            made=lambda folder, stem=stem: (tensors_of(folder / f"run/{stem}.safetensors"), metrics_of(folder / "run")),
            readable={f"run/{stem}.safetensors": tensors_of},
            tiny=True,
        )
        for stage, stem in STAGES.items()
    },
}
COMMANDS |= {
    f"{name} on workers": replace(
        COMMANDS[name],
        arguments=lambda folder, name=name: [*COMMANDS[name].arguments(folder), "--workers", "1", "--device", "cpu"],
    )
    for name in ("encode", "evaluate")
}
SHORT = ("generate", "encode", "convert", "evaluate", "pretrain")
"""Commands of the short form; a stage stands for all, which have one loop and one kind of checkpoint."""


@dataclass(frozen=True)
class Place:
    """A folder in which a command runs."""

    zygote: Zygote
    command: Command
    folder: Path

    @classmethod
    def of(cls, zygote: Zygote, name: str, folder: Path, inputs: Mapping[str, Path]) -> "Place":
        command = COMMANDS[name]
        folder.mkdir()
        for here, source in command.inputs.items():
            copy = shutil.copytree if inputs[source].is_dir() else shutil.copy
            copy(inputs[source], folder / here)
        return cls(zygote, command, folder)

    def start(self, **how: object) -> Started:
        """`most_bytes`, `read_only`, `fail_at`, `keeps_failing`, `count_operations`: tests/faults/zygote.py."""
        request = {"most_bytes": None, "read_only": False, "fail_at": None, "keeps_failing": False, **how}
        request.setdefault("count_operations", False)
        stderr = self.folder.with_name(f"{self.folder.name}.stderr")
        pid = self.zygote.ask(
            folder=str(self.folder), arguments=list(self.command.arguments(self.folder)), stderr=str(stderr),
            tiny=self.command.tiny, **request,
        )  # fmt: skip
        return Started(self.zygote, pid, self.folder, stderr)

    def run(self, **how) -> Ended:
        return self.start(**how).end()

    def made(self) -> object:
        return self.command.made(self.folder)

    def check_files(self, reference: "Reference") -> None:
        """Whatever has happened: a file under its final name is whole."""
        for name in self.command.same:
            path = self.folder / name
            assert not path.exists() or path.read_bytes() == reference.files[name], name
        for name, read in self.command.readable.items():
            if (self.folder / name).exists():
                read(self.folder / name)

    def check_end(self, ended: Ended) -> None:
        """A command has made all, or says in one line why not."""
        if ended.status == 1 and self.command.lists_failures:
            assert "Traceback" not in ended.stderr and re.search(r" [1-9]\d* failed", ended.stderr), ended.stderr
        elif ended.status:
            assert ended.status == 2 and ended.error, ended.stderr

    def leftovers(self) -> list[str]:
        """Files that a finished command has no use for."""
        rest = (".lock", ".journal")
        return [path.name for path in self.folder.rglob("*") if ".part" in path.name or path.suffix in rest]


@dataclass(frozen=True)
class Reference:
    """What a command makes that nothing disturbs."""

    made: object
    seconds: float
    files: Mapping[str, bytes]

    @classmethod
    def of(cls, place: Place) -> "Reference":
        ended = place.run().succeeded()
        files = {name: (place.folder / name).read_bytes() for name in place.command.same}
        return cls(place.made(), ended.seconds, files)


def write_yaml(path: Path, content: Mapping) -> Path:
    path.write_text(yaml.safe_dump(dict(content)))
    return path


SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT)
