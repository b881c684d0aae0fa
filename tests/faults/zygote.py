"""A process that has imported everything and forks for every command: a drill of hundreds of commands takes minutes.

It reads a request per line, JSON, and answers with a line. `start`: the id of a new process. `wait`: its exit status,
as waitpid gives it.
"""

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

from context_forcing import cli
from context_forcing.model.config import PRESETS, WanConfig

for name in ("video.generate", "train.presets", "train.loop", "train.data.encode", "train.evaluation.evaluate"):
    importlib.import_module(f"context_forcing.{name}")
importlib.import_module("context_forcing.train.evaluation.plots")
torch.set_num_threads(1)
TINY = WanConfig(dim=32, ffn_dim=64, num_heads=1, num_layers=2)


def give_up_rights() -> None:
    """Drop all capabilities: to root, too, a read-only folder is read-only then."""
    libc = ctypes.CDLL(None, use_errno=True)
    version_3 = struct.pack("II", 0x20080522, 0)
    if libc.capset(version_3, struct.pack("6I", *[0] * 6)):
        raise OSError(ctypes.get_errno(), "capset")


def run(request: dict) -> int:
    os.chdir(request["folder"])
    os.setsid()
    with open(request["stderr"], "wb") as file:
        os.dup2(file.fileno(), 2)
    os.dup2(os.open(os.devnull, os.O_RDWR), 1)
    sys.stdout, sys.stderr = os.fdopen(1, "w", buffering=1), os.fdopen(2, "w", buffering=1)
    os.environ |= request["environment"]
    if request["tiny"]:
        PRESETS["demo"] = TINY
    if request["most_bytes"] is not None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (request["most_bytes"],) * 2)
    if request["read_only"]:
        give_up_rights()
    sys.argv = ["context-forcing", *request["arguments"]]
    try:
        cli.main()
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    except BaseException:
        traceback.print_exc()
        return 70
    return 0


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
