"""What is measured: a student with its codecs or random weights of a published size, and the options compared."""

import dataclasses
import functools
import itertools
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ..memory.config import named_memory
from ..memory.fields import quoted
from ..memory.memory import Memory, empty_memory
from ..model.causal import compiled
from ..model.checkpoints.student import StudentSource
from ..model.codecs.backbone import Codecs, backbone_of
from ..model.codecs.base import PrecomputedText
from ..model.codecs.wan_vae import WanVAE
from ..model.config import PRESETS, StudentCard
from ..model.device import pick_device
from ..model.network import Network, run_directly
from ..model.offload import Offload
from ..model.sampler import CausalSampler, SamplerOptions, make_sampler
from ..model.units import latent_size
from ..video.pipeline import Pipeline
from .random_net import random_net

PROMPT = "A meadow under a clear sky by day. The camera pans right."
RANDOM_ROWS = 100
"""Rows of the random text embedding, about those of an extended prompt."""
MAX_SETUPS = 1000
SWITCH = {"off": False, "on": True}


@dataclass(frozen=True, kw_only=True)
class Setup:
    """One choice for every option that can be compared."""

    attention: str = "sdpa"
    dtype: str = "auto"
    kv_placement: str = "at once"
    kv_dtype: str = "auto"
    compile: str = "off"
    """Whether the parts of a block around attention are compiled (causal.compiled)."""
    offload: str = "off"
    memory: str = ""
    """A memory by name (memory.config.MEMORY_PRESETS); empty: the card's."""
    policy: str = ""
    """What slow memory keeps; empty: as the memory says."""
    commit_attends: str = ""
    """What the commit pass attends to; empty: as the card says."""

    def __post_init__(self):
        for name in ("compile", "offload"):
            if getattr(self, name) not in SWITCH:
                raise ValueError(f"{name}: {quoted(getattr(self, name))} is not one of {', '.join(SWITCH)}")
        if SWITCH[self.compile] and SWITCH[self.offload]:
            raise ValueError("compile: on has no effect with offload=on; compare them one by one")

    def differences(self, other: "Setup") -> str:
        """The options that are not those of another one, as the user writes them."""
        mine, its = dataclasses.asdict(self), dataclasses.asdict(other)
        return " ".join(f"{name}={value or 'own'}" for name, value in mine.items() if value != its[name])


def parse_setups(options: Sequence[str]) -> list[Setup]:
    """`attention=sdpa,sage dtype=bf16,fp32` -> every combination, the first values first. Raises ValueError."""
    names = [field.name for field in dataclasses.fields(Setup)]
    choices: dict[str, list[str]] = {}
    for option in (part for text in options for part in re.split(r"\s+(?=\w+=)", text.strip())):
        name, equals, values = option.partition("=")
        if name not in names or not equals or not all(values.split(",")):
            raise ValueError(f"options: {quoted(option)} is not NAME=VALUE,VALUE with a NAME of {', '.join(names)}")
        if name in choices:
            raise ValueError(f"options: {name} is given twice; give its values once, with commas between them")
        choices[name] = values.split(",")
    if (count := math.prod(map(len, choices.values()))) > MAX_SETUPS:
        raise ValueError(f"options: {count} combinations are too many; give values for {MAX_SETUPS} at most")
    return [Setup(**dict(zip(choices, values))) for values in itertools.product(*choices.values())]


@dataclass(frozen=True, kw_only=True)
class Subject:
    """A student, or random weights, that is loaded once for each dtype."""

    name: str
    card: StudentCard
    device: torch.device
    load: Callable[[torch.dtype, bool], Pipeline]
    """(dtype, offload) -> the student on its device, with codecs."""
    is_random: bool = False
    """Whether the weights are random: its pictures mean nothing."""

    def pipeline(self, setup: Setup) -> Pipeline:
        """The student in the dtype of a setup."""
        return self.load(pick_device(self.device.type, setup.dtype)[1], SWITCH[setup.offload])

    def sampler(self, setup: Setup, text_BLC: Tensor, on_pass: Callable[[], None] = lambda: None) -> CausalSampler:
        """A sampler with the options of a setup. Raises ValueError for what this machine does not have."""
        options = SamplerOptions(
            attention=setup.attention,
            kv_placement=setup.kv_placement,
            kv_dtype=setup.kv_dtype,
            commit_attends=setup.commit_attends or None,
        )
        network = self.pipeline(setup).network
        run = compiled() if SWITCH[setup.compile] else network.run
        # Without the texts of earlier loops: the time of the text is measured.
        commit = network.commit and dataclasses.replace(network.commit, on_pass=on_pass, texts=None)
        network = dataclasses.replace(network, on_pass=on_pass, run=run, commit=commit, texts=None)
        return make_sampler(network, self.card, text_BLC, options)

    def empty_memory(self, setup: Setup, size: tuple[int, int]) -> Memory:
        """An empty memory as a setup has it, for videos of (width, height). Raises ValueError."""
        config = named_memory(setup.memory, self.card.memory) if setup.memory else self.card.memory
        config = dataclasses.replace(config, policy=setup.policy or config.policy)
        return empty_memory(config, latent_size(*size))


def student_subject(
    source: StudentSource,
    device: torch.device,
    *,
    text_encoder: str | None = None,
    vae: str | None = None,
    decoder: str | None = None,
    models_dir: Path | None = None,
) -> Subject:
    """A student file with its codecs. Raises ValueError, one line."""
    student = source.open()

    @functools.cache
    def codecs(dtype: torch.dtype) -> Codecs:
        return backbone_of(student.card.base).load_codecs(
            device, dtype, [PROMPT], text_encoder=text_encoder, vae=vae, decoder=decoder, encodes=False,
            models_dir=models_dir,
        )  # fmt: skip

    @functools.cache
    def load(dtype: torch.dtype, offload: bool) -> Pipeline:
        return Pipeline.load(student, device, dtype, codecs(dtype), offload)

    name = student.card.name if source.path is None else Path(source.path).name
    return Subject(name=name, card=student.card, device=device, load=load)


def random_subject(size: str, num_layers: int | None, device: torch.device, seed: int = 0) -> Subject:
    """Random weights of a published size, cut to `num_layers`, with a random text and a random Wan VAE.

    Raises ValueError for an unknown size.
    """
    if size not in PRESETS:
        raise ValueError(f"size: {quoted(size)} is not one of {', '.join(PRESETS)}")
    config = PRESETS[size]
    num_layers = config.num_layers if num_layers is None else num_layers
    if not 1 <= num_layers <= config.num_layers:
        raise ValueError(f"layers: {num_layers}; {size} has {config.num_layers}, give 1 or more of them")
    config = dataclasses.replace(config, num_layers=num_layers)
    rows = torch.randn((1, RANDOM_ROWS, config.text_dim), generator=torch.Generator().manual_seed(seed))

    @functools.cache
    def load(dtype: torch.dtype, offload: bool) -> Pipeline:
        net = random_net(config, seed, torch.device("cpu") if offload else device, dtype)
        run = Offload(net, device) if offload else run_directly
        vae = WanVAE().to(device, dtype if device.type == "cuda" else torch.float32).eval().requires_grad_(False)
        return Pipeline(
            network=Network(net, device, dtype, run=run),
            card=card,
            text_encoder=PrecomputedText(name="random", rows={PROMPT: rows}),
            vae=vae,
        )

    card = StudentCard(name=f"random {size}", base=size)
    layers = "" if num_layers == PRESETS[size].num_layers else f", {num_layers} of {PRESETS[size].num_layers} layers"
    return Subject(name=f"{card.name}{layers}", card=card, device=device, load=load, is_random=True)
