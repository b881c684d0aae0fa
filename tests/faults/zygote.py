"""A process that has imported everything and forks for every command: a drill of hundreds of commands takes minutes.

It reads a request per line, JSON, and answers with a line. `start`: the id of a new process. `wait`: its exit status,
as waitpid gives it.
"""

import contextlib
import ctypes
import importlib
import json
import os
import resource
import signal
import struct
import sys
import traceback

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from context_forcing import cli
from context_forcing.model.config import PRESETS, WanConfig

MODULES = (
    "video.batch", "workers.local", "train.presets", "train.loop", "train.data.encode", "train.evaluation.evaluate",
    "train.evaluation.plots",
)  # fmt: skip
TINY = WanConfig(dim=32, ffn_dim=64, num_heads=1, num_layers=2)


def give_up_rights() -> None:
    """Drop all capabilities, also those of programs to be started: to root, too, a read-only folder is read-only."""
    libc = ctypes.CDLL(None, use_errno=True)
    set_securebits, no_root = 28, 1
    if os.geteuid() == 0 and libc.prctl(set_securebits, no_root, 0, 0, 0):
        raise OSError(ctypes.get_errno(), "prctl")
    version_3 = struct.pack("II", 0x20080522, 0)
    if libc.capset(version_3, struct.pack("6I", *[0] * 6)):
        raise OSError(ctypes.get_errno(), "capset")


class Operations(TorchDispatchMode):
    """Counts the operations of torch; memory is at its end at one of them, if that is given, or from it on."""

    def __init__(self, fail_at: int | None, keeps_failing: bool):
        super().__init__()
        self.count, self.fails = 0, range(0)
        if fail_at is not None:
            self.fails = range(fail_at, sys.maxsize if keeps_failing else fail_at + 1)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += 1
        if self.count - 1 in self.fails:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nOf which nothing is free")
        return function(*args, **(kwargs or {}))


def run(request: dict) -> int:
    os.chdir(request["folder"])
    os.setsid()
    with open(request["stderr"], "wb") as file:
        os.dup2(file.fileno(), 2)
    for number in (0, 1):
        os.dup2(os.open(os.devnull, os.O_RDWR), number)
    sys.stdout, sys.stderr = os.fdopen(1, "w", buffering=1), os.fdopen(2, "w", buffering=1)
    if request["tiny"]:
        PRESETS["demo"] = TINY
    if request["most_bytes"] is not None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (request["most_bytes"],) * 2)
    if request["read_only"]:
        give_up_rights()
    sys.argv = ["context-forcing", *request["arguments"]]
    counts = request["count_operations"] or request["fail_at"] is not None
    operations = Operations(request["fail_at"], request["keeps_failing"])
    try:
        with operations if counts else contextlib.nullcontext():
            cli.main()
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    except KeyboardInterrupt:  # outside of main, in this file
        return 130
    except BaseException:
        traceback.print_exc()
        return 70
    finally:
        if request["count_operations"]:
            print(f"operations {operations.count}", file=sys.stderr)
    return 0


def main() -> None:
    for name in MODULES:
        importlib.import_module(f"context_forcing.{name}")
    torch.set_num_threads(1)
    for line in sys.stdin:
        request = json.loads(line)
        if "wait" in request:
            answer = os.waitpid(request["wait"], 0)[1]
        elif not (answer := os.fork()):
            code = 71
            try:
                code = run(request)
                sys.stderr.flush()
            finally:
                os._exit(code)
        print(answer, flush=True)


if __name__ == "__main__":  # not in a worker of `batch`, which imports this file
    main()
