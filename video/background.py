"""Work on a second thread on what this thread makes, with a bounded queue between them.

A thread and not a process: torch computes and pipes are written without Python's lock, and a process would import torch
again and hold a second copy of the VAE.
"""

import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Generic, TypeVar

T = TypeVar("T")
R = TypeVar("R")
AtStop = Callable[[Callable[[], None]], None]
"""Takes a function that is called when the work must end at once, on the thread that ends it."""

ROOM = 2
"""Items that wait for the second thread. With more, no thread would wait less in the long run."""


class StoppedError(Exception):
    """The thread that makes the items has failed, so the work on them ends."""


def in_background(items: Iterable[T], work: Callable[[Iterator[T], AtStop], R], room: int = ROOM) -> R:
    """The result of `work`, which runs on a second thread on the items that this thread makes.

    At most `room` items wait; then this thread waits. An error of `work` is raised here, after the item that is being
    made. After an error or an interrupt here, the functions that `work` gave to its second argument are called, and its
    iterator raises StoppedError. The second thread has ended when this returns or raises.
    """
    queue = _Queue[T](room)
    with ThreadPoolExecutor(1, "context_forcing-background") as thread:
        try:
            result: Future[R] = thread.submit(lambda: work(queue.taken(), queue.at_stop))
            result.add_done_callback(lambda _: queue.stop())
            for item in items:
                if not queue.put(item):
                    break
            queue.end()
            return result.result()
        finally:
            queue.stop()


class _Queue(Generic[T]):
    """A bounded queue between two threads. Either of them can stop it."""

    def __init__(self, room: int):
        self._waiting: deque[T] = deque()
        self._room = room
        self._has_ended = self._is_stopped = False
        self._at_stop: list[Callable[[], None]] = []
        self._changed = threading.Condition()

    def put(self, item: T) -> bool:
        """Wait for room, and add an item. False if the queue is stopped."""
        with self._changed:
            self._changed.wait_for(lambda: len(self._waiting) < self._room or self._is_stopped)
            self._waiting.append(item)
            self._changed.notify_all()
            return not self._is_stopped

    def end(self) -> None:
        """There are no more items."""
        with self._changed:
            self._has_ended = True
            self._changed.notify_all()

    def taken(self) -> Iterator[T]:
        """The items as they come. Raises StoppedError if the queue is stopped before its end."""
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting or self._has_ended or self._is_stopped)
                if self._is_stopped:
                    raise StoppedError
                if not self._waiting:
                    return
                item = self._waiting.popleft()
                self._changed.notify_all()
            yield item

    def at_stop(self, call: Callable[[], None]) -> None:
        """Call a function when the queue is stopped; at once if it is."""
        with self._changed:
            self._at_stop.append(call)
            is_stopped = self._is_stopped
        if is_stopped:
            call()

    def stop(self) -> None:
        """Nothing is put or taken any more."""
        with self._changed:
            calls = [] if self._is_stopped else list(self._at_stop)
            self._is_stopped = True
            self._changed.notify_all()
        for call in calls:
            call()
