"""Every command of the documentation runs, or its options parse; CONTRIBUTING.md, Tests, explains the comments."""

import itertools
import re
import shlex
import sys
from pathlib import Path

import imageio_ffmpeg
import numpy as np
import pytest
import typer
from PIL import Image

from context_forcing import cli
from context_forcing.model.checkpoints.student import DEMO_STUDENT
from context_forcing.video.story import load_story
from context_forcing.video.storyboard import parse_storyboard

ROOT = Path(__file__).parents[2]
PAGES = ("README.md", "CONTRIBUTING.md", *sorted(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md")))
SHELL = ("sh", "console")
OTHERS = ("cd", "git", "ray", "tensorboard", ".venv/bin/pre-commit", ".venv/bin/ruff", ".venv/bin/pyright")
"""Commands that are not checked."""
STORY = "size: [32, 32]\nseed: 4\nsegments:\n  - {prompt: A meadow by day. The camera stays., seconds: 0.75}\n"


def commands_of(block):
    """The variables of the environment and the words of each command of a block, without comments."""
    for line in block.text.replace("\\\n", " ").splitlines():
        if words := shlex.split(line.removeprefix("$ "), comments=True):
            variables = list(itertools.takewhile(re.compile(r"[A-Z_]+=").match, words))
            yield dict(each.split("=", 1) for each in variables), words[len(variables) :]


def own_arguments(words):
    """The arguments of this package's command in a line, None if the line runs something else."""
    if words[0] == "context-forcing":
        return words[1:]
    if "context_forcing.cli" in words:
        return words[words.index("context_forcing.cli") + 1 :]
    if "context_forcing.train" in words:
        return ["train", *words[words.index("context_forcing.train") + 1 :]]
    return None


def parse(arguments):
    """Parse a command line, as Click does, without running it."""
    if "--help" in arguments:
        return
    group = typer.main.get_command(cli.app)
    with group.make_context("context-forcing", list(arguments)) as context:
        name, command, rest = group.resolve_command(context, list(arguments))
        command.make_context(name, rest, parent=context).close()


def check_other(words):
    """A command of another program: the target, extra, script or path that it names exists."""
    makefile, project = ((ROOT / name).read_text(encoding="utf-8") for name in ("Makefile", "pyproject.toml"))
    if words[0] == "make":
        assert all(re.search(rf"^{target}:", makefile, re.M) for target in words[1:]), words
    elif words[0] == "pip":
        extras = re.findall(r"\.\[(\w+)\]", " ".join(words))
        assert all(re.search(rf"^{extra} = \[", project, re.M) for extra in extras), words
    elif words[0].startswith("scripts/") or words[0] == "python":
        assert (ROOT / next(word for word in words if word.startswith("scripts/"))).is_file(), words
    elif words[:3] == [".venv/bin/python", "-m", "pytest"]:
        assert all((ROOT / word).exists() for word in words[3:] if word.startswith("tests")), words
    else:
        assert words[0] in OTHERS, f"{words[0]}: teach this test to check the command"


@pytest.mark.parametrize("page", PAGES)
def test_options_parse(page, documents):
    for block in documents[ROOT / page]:
        if block.language not in SHELL:
            continue
        assert block.kind in ("run", "smoke", "slow", "skip"), f"{block.where}: say how this block is tested"
        for _, words in commands_of(block):
            arguments = own_arguments(words)
            try:
                check_other(words) if arguments is None else parse(arguments)
            except Exception as error:
                pytest.fail(f"{block.where}: {' '.join(words)}: {error}")


def test_every_option_is_documented():
    text = "".join((ROOT / page).read_text(encoding="utf-8") for page in PAGES)
    for name, command in typer.main.get_command(cli.app).commands.items():
        options = [option for parameter in command.params for option in parameter.opts if option.startswith("--")]
        missing = [option for option in options if option not in text]
        assert f"context-forcing {name}" in text and not missing, f"{name}: {missing}"


@pytest.mark.parametrize("page", PAGES)
def test_files_are_understood(page, documents, tmp_path):
    """Stories and storyboards; a comment names a file of settings that a later command reads."""
    for block in documents[ROOT / page]:
        if block.language == "yaml" and "segments:" in block.text:
            path = tmp_path / "story.yaml"
            path.write_text(block.text)
            assert load_story(path).segments, block.where
        if block.language == "" and re.search(r"^0:00 ", block.text, re.M):
            assert parse_storyboard(block.text).lines, block.where


@pytest.fixture(scope="module")
def run():
    """(arguments) -> exit code of the command, run in this process."""

    def run(*arguments):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys, "argv", ["context-forcing", *arguments])
            try:
                cli.main()
            except SystemExit as stop:
                return stop.code or 0
        return 0

    return run


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder with the files that the documentation names, all of them small."""
    for name in ("story.yaml", "more.yaml", "other.yaml", "workflows/stories/minute.yaml"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(STORY)
    (tmp_path / "workflows/stories/storyboard.txt").write_text("0:00 A meadow.\n0:00.75 [cut] A desert.\n0:01.5\n")
    (tmp_path / "prompts.txt").write_text("A meadow by day.\nSnow at night.\n")
    (tmp_path / "my_student.safetensors").symlink_to(DEMO_STUDENT)
    Image.new("RGB", (32, 32), (90, 160, 80)).save(tmp_path / "first.png")
    (tmp_path / "videos").mkdir()
    (tmp_path / "videos" / "a.txt").write_text("A meadow by day.")
    writer = imageio_ffmpeg.write_frames(str(tmp_path / "videos" / "a.mp4"), (64, 64), fps=16)
    writer.send(None)
    for frame in range(33):
        writer.send(np.full((64, 64, 3), 4 * frame, np.uint8))
    writer.close()
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run_blocks(blocks, run, kinds):
    for block in blocks:
        if block.kind == "file":
            Path(block.rest).write_text(block.text + "\n")
        if block.language not in SHELL or block.kind not in kinds:
            continue
        appended = shlex.split(block.rest) if block.kind != "run" else []
        for variables, words in commands_of(block):
            arguments = own_arguments(words)
            assert arguments is not None, f"{block.where}: only context-forcing is run by tests"
            with pytest.MonkeyPatch.context() as patch:
                for name, value in variables.items():
                    patch.setenv(name, value)
                assert run(*arguments, *appended) == 0, f"{block.where}: {' '.join(words)}"


@pytest.mark.parametrize("page", PAGES)
def test_commands_run(page, documents, run, folder):
    """The commands of a page, one after the other in one folder."""
    run_blocks(documents[ROOT / page], run, ("run", "smoke"))


@pytest.mark.slow
def test_long_commands_run(documents, run, folder):
    run_blocks([block for blocks in documents.values() for block in blocks], run, ("slow",))
