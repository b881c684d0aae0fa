"""Workers of a Ray cluster: an actor for each GPU, or for each CPU. Files are on a disk that all machines share."""

import logging
from typing import Any

from ..memory.fields import brief
from .job import Death, Job, Outcome, Worker
from .local import check_count


class RayWorkers:
    """Actors of a Ray cluster; a lost one is replaced on whichever machine has room."""

    def __init__(self, address: str, count: int | None = None, device: str = "auto"):
        """`address` is `auto`, `local` or that of a cluster, as of ray.init. Raises ValueError."""
        try:
            import ray
        except ImportError:
            raise ValueError("--ray: needs the package ray; pip install 'context-forcing[ray]'") from None
        self._ray: Any = ray
        try:
            ray.init(address, log_to_driver=False, logging_level=logging.ERROR)
        except (ConnectionError, RuntimeError, ValueError) as error:
            raise ValueError(f"--ray: {brief(error, 160)}; start a cluster with `ray start --head`") from None
        has = {name: int(ray.cluster_resources().get(name, 0)) for name in ("CPU", "GPU")}
        self.device = ("cuda" if has["GPU"] else "cpu") if device == "auto" else device
        kind = "GPU" if self.device == "cuda" else "CPU"
        if not has[kind]:
            ray.shutdown()
            raise ValueError(f"--device: the cluster has no {kind}; start its machines with one, or give --device cpu")
        self.count = check_count(count, has[kind], has[kind], f"{kind}s of the cluster")
        share = {"num_gpus": 1} if kind == "GPU" else {"num_cpus": 1}
        self._worker = ray.remote(Worker).options(**share)
        self._actors: dict[int, Any] = {}
        self._running: dict[Any, int] = {}

    def give(self, place: int, job: Job) -> None:
        if place not in self._actors:
            self._actors[place] = self._worker.remote()
        self._running[self._actors[place].do.remote(job)] = place

    def wait(self, seconds: float) -> list[tuple[int, Outcome | Death]]:
        ready, _ = self._ray.wait(list(self._running), num_returns=1, timeout=seconds)
        ended = []
        for task in ready:
            place = self._running.pop(task)
            try:
                ended.append((place, self._ray.get(task)))
            except self._ray.exceptions.RayError as error:
                self._ray.kill(self._actors.pop(place))
                ended.append((place, Death(reason=_first_line(error))))
        return ended

    def close(self) -> None:
        self._ray.shutdown()


def _first_line(error: Exception) -> str:
    """What a reader needs of Ray's message."""
    cause = getattr(error, "cause", None) or error
    lines = [line.strip() for line in str(cause).splitlines() if line.strip()]
    return brief(f"{type(error).__name__}: {lines[0] if lines else ''}", 160)
