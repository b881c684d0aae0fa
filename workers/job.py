"""What a worker does, and what comes of it."""

import contextlib
import logging
import time
from collections.abc import Callable, Hashable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

from ..memory.fields import one_line
from ..memory.files import of_disk
from ..model.device import is_out_of_memory, out_of_memory

log = logging.getLogger("context_forcing")

Value = TypeVar("Value")


class Loaded:
    """What a worker has loaded for one job and keeps for the next."""

    def __init__(self):
        self._key: Hashable = None
        self._value: Any = None

    def get(self, key: Hashable, load: Callable[[], Value]) -> Value:
        """What was loaded last, if that was under the same key. Else it is freed, and `load` is called."""
        if self._key != key:
            self._key = self._value = None
            self._value = load()
            self._key = key
        return self._value


class Job(Protocol):
    """A piece of work. It is pickled, and can be done again after a worker died in it."""

    @property
    def name(self) -> str:
        """What identifies it, in tables and messages."""
        ...

    def num_kept(self) -> int:
        """Steps that are on the disk, also while a worker does it. 0: nothing is kept before its end."""
        ...

    def run(self, loaded: Loaded) -> Any:
        """Do it, or what is left of it; returns what comes of it, pickled, without tensors.

        Raises ValueError, FloatingPointError and OSError for what another attempt would meet too.
        """
        ...


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What came of a job: a result, or a problem that another attempt would have too."""

    result: Any = None
    seconds: float = 0.0
    problem: str = ""
    messages: tuple[str, ...] = ()
    """What the worker logged."""


@dataclass(frozen=True, kw_only=True)
class Death:
    """A worker ended before its job did."""

    reason: str


class Worker:
    """Does one job after the other."""

    def __init__(self):
        self._loaded = Loaded()

    def do(self, job: Job) -> Outcome:
        """Do a job. An error that a user can cause is a problem of the job."""
        began = time.monotonic()
        with _collected() as messages:
            try:
                result = job.run(self._loaded)
            except OSError as error:
                return Outcome(problem=one_line(of_disk(error)), messages=tuple(messages))
            except (ValueError, FloatingPointError) as error:
                return Outcome(problem=one_line(str(error)), messages=tuple(messages))
            except (MemoryError, RuntimeError) as error:
                if not is_out_of_memory(error):
                    raise
                return Outcome(problem=out_of_memory(error), messages=tuple(messages))
        return Outcome(result=result, seconds=time.monotonic() - began, messages=tuple(messages))


@contextlib.contextmanager
def _collected() -> Iterator[list[str]]:
    """What is logged inside, in a list."""
    messages: list[str] = []
    handler, level = logging.Handler(), log.level
    handler.emit = lambda record: messages.append(record.getMessage())
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    try:
        yield messages
    finally:
        log.removeHandler(handler)
        log.setLevel(level)
