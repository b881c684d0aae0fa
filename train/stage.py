"""A training stage: networks with optimisers, one iteration, and the file that it exports."""

import dataclasses
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from ..model.checkpoints.published import BASE
from ..model.checkpoints.student import StudentSource, check_tensors, write_student
from ..model.config import CARD_KEY, PRESETS, StudentCard
from ..model.network import Network
from ..model.text_cache import TextCache
from ..model.wan import WanModel
from .config import OptimConfig
from .lora import add_lora, merge_lora, save_lora
from .parallel import Gathered, ParallelState, module_runner, shard_network
from .trained_network import TrainedNetwork


class Stage(ABC):
    """What the training loop runs. Subclasses fill `trained` and implement `step` and `card` (or `export`).

    All methods but the constructor are called on every rank.
    """

    exported = "student"
    """The trained network that is exported; also the stem of its file."""

    def __init__(self, config: Any, parallel: ParallelState):
        parallel.samples(config.batch)  # raises for a batch that does not divide
        self.config, self.parallel = config, parallel
        self.trained: dict[str, TrainedNetwork] = {}
        self.gathered = Gathered()
        self.starts: dict[str, str] = {}
        """The file that each network starts from; empty for new weights."""
        self.finished = False
        """Whether the run must end before its last step, on all ranks alike."""
        self.init_card: StudentCard | None = None
        """The card of the file that the exported network starts from."""

    def load_network(self, path: str, name: str = "", optim: OptimConfig | None = None, preset: str = "") -> Network:
        """A sharded network from a file of any published layout, or with new weights if `path` is empty.

        It is trained as `name` with `optim`; without, it is frozen and in the compute dtype. Its sizes are those of
        `preset`, or of the stage's preset. Raises ValueError for a file of another size.
        """
        config, card = self.config, None
        self.starts[name or "teacher, frozen"] = path
        net = WanModel(PRESETS[preset or config.preset])
        if path:
            # Any network can be trained further: the card of a file without one is not used.
            student = StudentSource(path, card=BASE).open()
            if student.named.commit:
                raise ValueError(f"{path}: has weights of its own for the commit pass; train from a student without")
            check_tensors(net, student.named.tensors, path)
            net.load_state_dict({weight: student.tensor(weight) for weight in student.named.tensors})
            card = student.own_card
        else:
            net.reset_parameters(torch.Generator().manual_seed(config.seed))
        net = add_lora(net, config.lora, config.seed) if optim else net.requires_grad_(False).to(config.dtype)
        net = shard_network(net, self.parallel, config.dtype)
        if optim:
            self.trained[name] = TrainedNetwork(net, optim, self.parallel)
        if name == self.exported:
            self.init_card = card
        run = module_runner(net, config.recompute, self.gathered)
        network = Network(net, self.parallel.device, config.dtype, run=run, texts=None if optim else TextCache())
        return network.shared_by(self.parallel.processes) if self.parallel.processes else network

    @abstractmethod
    def step(self, step: int) -> dict[str, float]:
        """One iteration. Returns metrics, among them `loss`."""

    def sample(self) -> Image.Image | None:
        """A sample image, or None if the stage has none."""
        return None

    def validate(self) -> dict[str, float]:
        """Validation metrics."""
        return {}

    def extra_state(self) -> dict[str, Tensor]:
        """Tensors of this rank that checkpoints contain."""
        return {}

    def load_extra_state(self, state: dict[str, Tensor]) -> None:  # noqa: B027
        """Restore the tensors of this rank."""

    def lr_factor(self, step: int) -> float:
        """Share of the learning rate: a linear warmup, then constant, then a linear decay to zero."""
        config = self.config
        decay = (config.steps - step) / (config.decay * config.steps) if config.decay else 1.0
        return min(1.0, (step + 1) / max(1, config.warmup), decay)

    def card(self) -> StudentCard:
        """Name, stage, steps, solver and data of the exported network; `export` adds the other fields."""
        raise NotImplementedError

    def export(self, folder: Path, step: int, seconds: float, revision: str) -> Path:
        """Write the exported network with its card. Adapters are merged, and written to a second file."""
        config, lora, path = self.config, self.config.lora, folder / f"{self.exported}.safetensors"
        weights = self.trained[self.exported].weights()
        if self.init_card:
            revision = f"{self.init_card.revision}; then {revision}"
            step, seconds = step + (self.init_card.train_steps or 0), seconds + (self.init_card.train_seconds or 0)
        card = dataclasses.replace(
            self.card(), base=config.preset, shift=config.shift, memory=config.memory, size=tuple(config.size),
            revision=revision, data_seed=config.data_seed, train_steps=step, train_seconds=round(seconds),
        )  # fmt: skip
        if self.parallel.is_main:
            write_student(path, merge_lora(weights, lora), config.network.num_heads, card)
            if lora.rank:
                save_lora(path.with_stem(path.stem + "_lora"), weights, lora, {CARD_KEY: card.to_json()})
        return path
