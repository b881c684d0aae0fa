"""Workers that are processes of this machine."""

import contextlib
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Iterator
from multiprocessing import connection as pipes
from multiprocessing import resource_tracker
from multiprocessing.process import BaseProcess, parent_process
from typing import Any

import torch

from ..model.device import pick_device
from .job import Death, Job, Outcome, Worker

DEVICES = "CUDA_VISIBLE_DEVICES"


class LocalWorkers:
    """Processes of this machine: one for each GPU, or `count` on the CPU."""

    def __init__(self, count: int | None = None, device: str = "auto"):
        """`count` None: one for each GPU, one on the CPU. Raises ValueError."""
        self.device = pick_device(device)[0].type
        is_cuda = self.device == "cuda"
        self._devices = _gpus() if is_cuda else None
        most = len(self._devices) if self._devices else os.cpu_count() or 1
        self.count = check_count(count, most if is_cuda else 1, most, "GPUs" if is_cuda else "cores of this machine")
        self._context = multiprocessing.get_context("spawn")
        self._places: dict[int, tuple[BaseProcess, pipes.Connection]] = {}
        self._busy: set[int] = set()

    def give(self, place: int, job: Job) -> None:
        if place in self._places and not self._places[place][0].is_alive():
            self._remove(place)
        if place not in self._places:
            here, there = self._context.Pipe()
            environment = {DEVICES: self._devices[place]} if self._devices else {}
            threads = max(1, (os.cpu_count() or 1) // self.count)
            process = self._context.Process(target=_work, args=(there, environment, threads), daemon=True)
            with _interrupts_blocked():
                process.start()
            there.close()
            self._places[place] = process, here
        self._busy.add(place)
        with contextlib.suppress(BrokenPipeError):  # It has just died, and `wait` says so.
            self._places[place][1].send(job)

    def wait(self, seconds: float) -> list[tuple[int, Outcome | Death]]:
        waited = {thing: place for place in self._busy for thing in self._things(place)}
        places = {waited[thing] for thing in pipes.wait(list(waited), seconds)}
        ended = []
        for place in sorted(places):
            process, connection = self._places[place]
            self._busy.discard(place)
            try:
                if not connection.poll():
                    raise EOFError
                ended.append((place, connection.recv()))
            except (EOFError, OSError):
                process.join()
                ended.append((place, Death(reason=_exit_reason(process.exitcode))))
                self._remove(place)
        return ended

    def close(self) -> None:
        for process, _ in self._places.values():
            process.terminate()
        for place in list(self._places):
            self._remove(place)
        self._busy.clear()

    def _things(self, place: int) -> tuple[Any, Any]:
        process, connection = self._places[place]
        return connection, process.sentinel

    def _remove(self, place: int) -> None:
        process, connection = self._places.pop(place)
        connection.close()
        process.join()


def check_count(count: int | None, default: int, most: int, of: str) -> int:
    """A number of workers. Raises ValueError."""
    if count is not None and not 1 <= count <= most:
        raise ValueError(f"--workers: {count} is not from 1 to {most}, the number of {of}")
    return count or default


def _gpus() -> list[str]:
    """The GPUs that this process can use, as CUDA_VISIBLE_DEVICES names them."""
    named = os.environ.get(DEVICES)
    return named.split(",") if named else [str(number) for number in range(torch.cuda.device_count())]


def _exit_reason(code: int | None) -> str:
    if code is not None and code < 0:
        with contextlib.suppress(ValueError):
            return f"ended by {signal.Signals(-code).name}"
    return f"ended with exit code {code}"


def _work(connection: pipes.Connection, environment: dict[str, str], threads: int) -> None:
    """The main function of a worker: a job comes in, an outcome goes out, until the pipe is closed."""
    os.environ.update(environment)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # An interrupt is for the parent, which ends the workers.
    threading.Thread(target=_end_with_parent, daemon=True).start()
    worker = Worker()
    with contextlib.suppress(EOFError, BrokenPipeError):
        while True:
            job = connection.recv()
            if "OMP_NUM_THREADS" not in os.environ:
                torch.set_num_threads(threads)
            connection.send(worker.do(job))


def _end_with_parent() -> None:
    """End this worker as soon as its parent is gone: the next one could not write the same files before."""
    parent = parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


@contextlib.contextmanager
def _interrupts_blocked() -> Iterator[None]:
    """A process that is started inside never meets Ctrl-C, also while it imports; this one meets it afterwards."""
    if sys.platform == "win32":
        yield
        return
    resource_tracker.ensure_running()  # Else `start` starts it, which ends the blocking.
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
