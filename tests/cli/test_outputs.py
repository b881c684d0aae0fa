"""Full disks, memory at its end, odd names, late interrupts: one line, and the film is kept."""

import errno
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file

from context_forcing.memory import snapshot
from context_forcing.memory.stores import KV_PLACEMENTS
from context_forcing.model.sampler import CausalSampler
from context_forcing.video.pipeline import Pipeline
from context_forcing.video.provenance import read_provenance
from context_forcing.video.reading import read_frames

STORY = {"size": [48, 32], "seed": 4, "segments": [{"prompt": "a meadow by day", "seconds": 2.25}]}
NUM_CHUNKS = 3


@pytest.fixture
def generate(run, student, tmp_path, monkeypatch):
    """(options) -> exit code, stderr; of film.mp4 in the folder of this test."""
    (tmp_path / "story.yaml").write_text(yaml.safe_dump(STORY))
    monkeypatch.chdir(tmp_path)
    return lambda *options, output="film.mp4": run(
        "generate", "story.yaml", "-o", output, "--student", student, "--scale", 1, *options
    )


def last_line(err):
    """The error, in one line of at most 300 characters."""
    line = err.strip().splitlines()[-1]
    assert line.startswith("error: ") and len(line) <= 300 and "Traceback" not in err, err
    return line


def names(folder):
    return {path.name for path in folder.iterdir()}


OUTPUTS = {"--memory-out": "kept.memory", "--report": "report.png"}


@pytest.mark.parametrize("option, name", OUTPUTS.items())
def test_a_folder_that_cannot_be_written_is_refused_first(generate, refused, tmp_path, monkeypatch, option, name):
    refused(generate(option, f"story.yaml/{name}"), option, "does not exist")
    touch = Path.touch

    def denied(path, *args, **kwargs):
        if name in path.name:
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        touch(path, *args, **kwargs)

    monkeypatch.setattr(Path, "touch", denied)
    refused(generate(option, name), f"{option}: {name} cannot be written (Permission denied)")
    assert names(tmp_path) == {"story.yaml"}


def test_a_report_that_cannot_be_written_is_refused_first(generate, run, refused, succeeded, tmp_path, monkeypatch):
    def denied(path, *args, **kwargs):
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    succeeded(generate("--memory-out", "kept.memory"))
    before = names(tmp_path)
    monkeypatch.setattr(Path, "touch", denied)
    refused(run("report", "kept.memory", "-o", "r.png"), "--output: r.png cannot be written (Permission denied)")
    assert names(tmp_path) == before


@pytest.mark.parametrize("option, name", OUTPUTS.items())
def test_a_disk_that_fills_up_at_the_end_costs_no_film(generate, succeeded, tmp_path, monkeypatch, option, name):
    def full(*args, **kwargs):
        part = next(arg for arg in args if isinstance(arg, Path))
        part.write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(snapshot, "save_file", full) if option == "--memory-out" else patch.setattr(
            Image.Image, "save", full
        )
        code, err = generate(option, name)
    line = last_line(err)
    assert code == 2 and name in line and "No space left" in line and "film.mp4 is whole" in line and "--resume" in line
    assert names(tmp_path) == {"story.yaml", "film.mp4", "film.mp4.journal"}
    film = (tmp_path / "film.mp4").read_bytes()
    succeeded(generate(option, name, "--resume"))
    assert names(tmp_path) == {"story.yaml", "film.mp4", name} and (tmp_path / "film.mp4").read_bytes() == film


ERRORS = {
    "CUDA": torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\n" + "x" * 1000),
    "CPU": RuntimeError("[enforce fail at alloc_cpu.cpp:118] . DefaultCPUAllocator: can't allocate memory"),
    "MPS": RuntimeError("MPS backend out of memory (MPS allocated: 9.07 GB)"),
    "cuBLAS": RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    "load_state_dict": RuntimeError("Error(s) in loading state_dict for Net: ... ('CUDA out of memory.',)."),
    "Python": MemoryError(),
}


@pytest.mark.parametrize("error", ERRORS.values(), ids=ERRORS)
def test_out_of_memory_says_what_is_kept(generate, succeeded, tmp_path, monkeypatch, error):
    whole = Pipeline.generate

    def two_chunks(self, *args, **kwargs):
        chunks = whole(self, *args, **kwargs)
        yield next(chunks)
        yield next(chunks)
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(Pipeline, "generate", two_chunks)
        code, err = generate("--memory-out", "kept.memory")
    line = last_line(err)
    assert code == 2 and "out of memory" in line and "the finished chunks are kept: --resume with --offload" in line
    assert load_file(tmp_path / "kept.memory")["film"].shape[2] == 2 * 3
    assert names(tmp_path) == {"story.yaml", "kept.memory", "film.mp4.journal"}
    succeeded(generate("--memory-out", "kept.memory", "--resume", "--kv-placement", "from RAM"))
    assert load_file(tmp_path / "kept.memory")["film"].shape[2] == NUM_CHUNKS * 3
    assert names(tmp_path) == {"story.yaml", "kept.memory", "film.mp4"}


def test_out_of_memory_in_a_chunk_is_survived_once(generate, succeeded, tmp_path, monkeypatch, caplog):
    """The second of three chunks begins again; memory at its end in the smallest placement ends the command."""
    succeeded(generate("--memory-out", "kept.memory"))
    film, memory = ((tmp_path / name).read_bytes() for name in ("film.mp4", "kept.memory"))
    whole, calls = CausalSampler.denoise, []

    def fails(at):
        def denoise(self, *args):
            calls.append(self.options.kv_placement)
            if len(calls) in at:
                raise torch.cuda.OutOfMemoryError("CUDA out of memory")
            return whole(self, *args)

        calls.clear()
        monkeypatch.setattr(CausalSampler, "denoise", denoise)

    fails({2})
    succeeded(generate("--memory-out", "kept.memory"))
    assert [record.getMessage().endswith("--kv-placement 'by layer' begins so") for record in caplog.records] == [True]
    assert calls == ["at once", "at once", "by layer", "by layer"]
    assert (tmp_path / "film.mp4").read_bytes() == film and (tmp_path / "kept.memory").read_bytes() == memory
    fails(range(2, 100))
    code, err = generate()
    assert code == 2 and "out of memory" in last_line(err) and calls == ["at once", *KV_PLACEMENTS]
    fails({1})
    succeeded(generate("--resume"))
    assert (tmp_path / "film.mp4").read_bytes() == film and calls == ["at once", "by layer", "by layer"]


def test_eight_bits_are_written_down(generate, succeeded, run, tmp_path, student):
    """In the video's tags, from which --like takes them; a memory of them goes on; they need fewer bytes."""
    film, memory = tmp_path / "film.mp4", tmp_path / "kept.memory"
    succeeded(generate("--memory-out", memory))
    plain, size = film.read_bytes(), memory.stat().st_size
    succeeded(generate("--memory-out", memory, "--kv-dtype", "int8"))
    packed = film.read_bytes()
    assert packed != plain and memory.stat().st_size < size
    assert read_provenance(film).kv_dtype == "int8"
    again = tmp_path / "again.mp4"
    succeeded(run("generate", "--like", film, "-o", again, "--student", student))
    assert again.read_bytes() == packed
    succeeded(generate("--memory-in", memory, "--kv-dtype", "int8"))
    code, err = generate("--kv-dtype", "int4")
    assert code == 2 and "kv_dtype: 'int4' is not one of auto, int8, fp8" in last_line(err)


@pytest.mark.parametrize("error", ERRORS.values(), ids=ERRORS)
def test_out_of_memory_while_a_student_is_loaded(generate, refused, tmp_path, monkeypatch, error):
    def load(*args, **kwargs):
        raise error

    monkeypatch.setattr(Pipeline, "load", load)
    result = generate()
    refused(result, "out of memory", "smaller size")
    assert len(last_line(result[1])) <= 300 and names(tmp_path) == {"story.yaml"}


def test_another_runtime_error_is_not_hidden(generate, monkeypatch):
    def load(*args, **kwargs):
        raise RuntimeError("a mistake of ours")

    monkeypatch.setattr(Pipeline, "load", load)
    with pytest.raises(RuntimeError, match="a mistake of ours"):
        generate()


@pytest.mark.skipif(os.name == "nt", reason="names with a colon are streams of a file there")
@pytest.mark.parametrize("name", ["12:30.mp4", "http:a.mp4", "concat:a|b.mp4", "-y.mp4"])
def test_names_that_look_like_protocols_or_options(generate, succeeded, tmp_path, name):
    succeeded(generate(output=f"./{name}" if name.startswith("-") else name))
    assert names(tmp_path) == {"story.yaml", name}
    _, frames = read_frames(name)
    assert sum(1 for _ in frames) == 1 + 4 * (NUM_CHUNKS * 3 - 1)


@pytest.mark.parametrize("fps", [1, 12])
def test_a_video_of_few_frames_a_second_begins_with_a_picture(generate, succeeded, tmp_path, fps):
    (tmp_path / "story.yaml").write_text(yaml.safe_dump({**STORY, "fps": fps}))
    Image.new("RGB", (96, 64), (40, 160, 90)).save(tmp_path / "start.png")
    succeeded(generate("--start", "start.png"))
    _, frames = read_frames("film.mp4")
    assert next(frames).reshape(-1, 3).mean(0) == pytest.approx((40, 160, 90), abs=30)


@pytest.mark.skipif(os.name == "nt", reason="a process is stopped by a signal")
def test_an_interrupt_after_the_end_is_no_error():
    script = """
import atexit, os, signal, sys
atexit.register(lambda: os.kill(os.getpid(), signal.SIGINT))
from context_forcing import cli
sys.argv = ["context-forcing", "--help"]
cli.main()
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0 and "Usage" in done.stdout and done.stderr == ""


@pytest.mark.skipif(os.name == "nt", reason="a process is stopped by a signal")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_before_the_command_begins_prints_no_traceback(number):
    script = f"""
import os, signal, sys, typer.main
from context_forcing import cli
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background commands ignore it
typer.main.get_group = lambda app: os.kill(os.getpid(), {int(number)})
sys.argv = ["context-forcing", "doctor"]
cli.main()
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 130 and done.stderr == ""
