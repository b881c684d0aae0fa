"""Every option of every command, through the command's own parser. What would take long does nothing here."""

import os
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
import typer
import yaml
from hypothesis import strategies as st
from PIL import Image

from context_forcing import cli
from context_forcing.benchmark import measure as measuring
from context_forcing.benchmark import subject, tables
from context_forcing.memory import MemoryConfig, empty_memory
from context_forcing.memory.snapshot import save_memory
from context_forcing.train import loop, presets
from context_forcing.train.data.encode import SetEncoder
from context_forcing.train.evaluation import evaluate
from context_forcing.video import batch
from context_forcing.video.generate import GenerateJob
from context_forcing.workers import local, ray_workers

from ..workers.here import Here
from .drill import SCALARS, TEXTS, bounded, drill, is_line, refused

STORY = {"size": [48, 32], "seed": 4, "segments": [{"prompt": "a meadow", "seconds": 0.75}]}
GIVEN = {
    "generate": ["story.yaml", "-o", "film.mp4", "--student", "STUDENT", "--scale", "1"],
    "report": ["kept.memory", "-o", "report.png", "--student", "STUDENT"],
    "train": ["pretrain", "--config", "smoke"],
    "encode": ["prompts.txt", "-o", "set"],
    "evaluate": ["-o", "results", "--student", "STUDENT", "--gaps", "4"],
    "batch": ["jobs.yaml"],
    "convert": ["STUDENT", "-o", "converted.safetensors"],
    "bench": ["--student", "STUDENT", "--chunks", "1", "--no-ports"],
    "doctor": [],
}
"""Arguments with which a command succeeds."""
COMMANDS = typer.main.get_command(cli.app).commands
FILES = (
    "story.yaml", "jobs.yaml", "kept.memory", "start.png", "prompts.txt", "folder", "nothing", "folder/x.mp4",
    "STUDENT", "x.mp4", "x.png", "x.safetensors", "nothing/x.mp4", "nothing/x.png", "empty", "noise.mp4",
    "noise.safetensors", "noise.txt",
)  # fmt: skip
WORDS = (
    "x", "0", "-1", "99999999999999999999", "2", "0.5", "nan", "inf", "1e400", "1,2", "8,8", ",", "auto", "cpu", "cuda",
    "fp32", "bf16", "released", "recall", "none", "oracle", "demo=", "demo=clean,clean", "novel:slow=2", "novel:slow=",
    "9,18", "16x16", "65536x65536", "0x0", "17x16", "steps=1", "shift=", "a=b=c", "STUDENT:1", "STUDENT=clean",
    "export", "vae", "run=folder", "steps=0", "from RAM", "fast only", "x:y:z", "1000000", "48x32", "dtype=bf16,fp32",
    "attention=sdpa,x", "policy=recall,x compile=on",
)  # fmt: skip
ARGUMENTS = (
    st.sampled_from((*FILES, *WORDS))
    | st.sampled_from(TEXTS)
    | st.sampled_from(SCALARS).map(str)
    | st.text(max_size=20)
)


def names_in(folder: Path) -> set[tuple[str, int]]:
    """Files and folders below a folder, with their sizes."""
    return {(str(path.relative_to(folder)), path.stat().st_size * path.is_file()) for path in folder.rglob("*")}


def clean(folder: Path, before: set[tuple[str, int]]) -> None:
    known = {name for name, _ in before}
    for path in sorted(folder.rglob("*"), reverse=True):
        if str(path.relative_to(folder)) not in known:
            path.rmdir() if path.is_dir() else path.unlink()


@pytest.fixture(scope="module")
def workplace(tmp_path_factory, student):
    """A folder with a file of each kind. It lies deep, so that ../.. is not the folder of another test."""
    folder = tmp_path_factory.mktemp("commands") / "a" / "b" / "c"
    folder.mkdir(parents=True)
    (folder / "story.yaml").write_text(yaml.safe_dump(STORY))
    jobs = {"output": "{story}.mp4", "stories": ["story.yaml"], "students": [str(student)]}
    (folder / "jobs.yaml").write_text(yaml.safe_dump(jobs))
    (folder / "prompts.txt").write_text("a meadow\na desert\n")
    Image.new("RGB", (48, 32)).save(folder / "start.png")
    save_memory(folder / "kept.memory", empty_memory(MemoryConfig(), (16, 4, 6)))
    (folder / "folder").mkdir()
    (folder / "empty").touch()
    for suffix in ("mp4", "safetensors", "txt"):
        (folder / f"noise.{suffix}").write_bytes(bytes(range(256)))
    return folder


@pytest.fixture
def command(run, workplace, student, monkeypatch):
    """(arguments) -> exit code, stderr; the work of a command is left out, what comes before is not."""
    monkeypatch.chdir(workplace)
    monkeypatch.delenv("COMFYUI_PATH", raising=False)
    monkeypatch.setattr(GenerateJob, "run", lambda job, on_chunk: job.journal.close() or 9)
    monkeypatch.setattr(SetEncoder, "run", lambda encoder, *on_clip: None)
    monkeypatch.setattr(SetEncoder, "num_clips", 1)
    monkeypatch.setattr(batch.Batch, "run", lambda *_: None)
    monkeypatch.setattr(local, "LocalWorkers", lambda *_: Here())
    monkeypatch.setattr(ray_workers, "RayWorkers", lambda *_: Here())
    monkeypatch.setattr(presets, "build_stage", lambda stage, settings: None)
    monkeypatch.setattr(loop, "train", lambda *_: Path("student.safetensors"))
    monkeypatch.setattr(evaluate.SceneJob, "run", lambda *_: [])
    monkeypatch.setattr(evaluate.Results, "add", lambda *_: None)
    monkeypatch.setattr(evaluate, "_report", lambda *_: [])
    monkeypatch.setattr(measuring, "filled", lambda sampler, memory, seed: memory)
    monkeypatch.setattr(measuring._Bench, "_warm_up", lambda *_: None)
    monkeypatch.setattr(measuring, "_time", lambda *_: None)
    for name in ("_speed", "film", "growth", "drift"):
        monkeypatch.setattr(measuring._Bench, name, lambda *_: ())
    monkeypatch.setattr(subject, "WanVAE", torch.nn.Identity)
    monkeypatch.setattr(tables, "tables_of", lambda *_: [])
    monkeypatch.setattr(tables, "write_json", lambda *_: None)

    def command(*arguments):
        return run(*(text.replace("STUDENT", str(student)) for text in arguments))

    return command


@contextmanager
def nothing_is_written(folder):
    before = names_in(folder)
    try:
        yield before
    finally:
        clean(folder, before)


@st.composite
def command_lines(draw):
    name = draw(st.sampled_from(sorted(COMMANDS)))
    arguments = list(GIVEN[name])
    if draw(st.integers(0, 9)) == 0 and arguments:
        arguments[draw(st.integers(0, len(arguments) - 1))] = draw(ARGUMENTS)
    for _ in range(draw(st.integers(1, 3))):
        if not COMMANDS[name].params:
            break
        parameter = draw(st.sampled_from(COMMANDS[name].params))
        option = draw(st.sampled_from(parameter.opts)) if parameter.param_type_name == "option" else ""
        if option in ("--help", "--version"):
            continue
        arguments += [option] if option else []
        arguments += [] if getattr(parameter, "is_flag", False) else [draw(ARGUMENTS)]
    return [name, *arguments]


@drill(60, arguments=command_lines())
def test_options(command, workplace, arguments):
    # A program is started with neither NUL nor what is not UTF-8 in its arguments.
    arguments = [text.replace("\x00", "").encode(errors="ignore").decode() for text in arguments]
    kind = f"command {arguments[0]}"
    with nothing_is_written(workplace) as before:
        with bounded(kind):
            code, err = command(*arguments)
        assert "Traceback" not in err and code in (0, 2), err
        if code == 2 and not ("--inspect" in arguments and "refused" not in err):
            refused[kind] += 1
            line = err.strip().splitlines()[-1]
            assert line.startswith("error: ") and is_line(line.removeprefix("error: ")), err
            assert "out of memory" not in line, line
            assert names_in(workplace) == before, line


@pytest.mark.parametrize("name", sorted(COMMANDS))
def test_the_arguments_that_are_changed_are_right(command, workplace, name):
    with nothing_is_written(workplace):
        code, err = command(name, *GIVEN[name])
        assert code == 0, err


@pytest.mark.skipif(os.name == "nt", reason="no such files there")
@pytest.mark.parametrize("name", sorted(set(COMMANDS) - {"doctor"}))
def test_endless_files(command, workplace, name):
    """/dev/zero never ends."""
    for place in (place for place, text in enumerate(GIVEN[name]) if not text.startswith("-")):
        arguments = [*GIVEN[name][:place], "/dev/zero", *GIVEN[name][place + 1 :]]
        with nothing_is_written(workplace), bounded(f"command {name}"):
            code, err = command(name, *arguments)
            assert code == 2 and is_line(err.strip().splitlines()[-1].removeprefix("error: ")), (arguments, err)
