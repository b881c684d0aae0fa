"""Rows of an evaluation: a policy, and settings that differ from the student's card."""

import dataclasses
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ...memory.config import EVICTIONS, POLICIES
from ...memory.fields import quoted
from ...memory.memory import Memory
from ...memory.packed import KV_DTYPES
from ...memory.view import ATTENDS
from ...model.sampler import SamplerOptions
from ...video.pipeline import Pipeline
from ..world.prompts import Style
from .choosers import CHOOSERS, ChoosingCamera
from .rollout import Camera

NO_SLOW = "none"
"""The name of no slow memory among policies."""
_SIZES = ("sink", "slow", "fast")
_WORDS = {"commit_attends": ATTENDS, "eviction": EVICTIONS, "kv_dtype": KV_DTYPES}
SETTINGS = ("recache", "match_sink", *_SIZES, *_WORDS)


@dataclass(frozen=True, kw_only=True)
class Variant:
    """What a student is measured under."""

    policy: str
    """A policy of memories, NO_SLOW, or one of CHOOSERS."""
    memory: Mapping[str, Any] = field(default_factory=dict)
    """Fields of the memory's config that differ from the card."""
    commit_attends: str | None = None
    kv_dtype: str = "auto"
    """How sink and slow frames are stored: one of packed.KV_DTYPES."""
    match_sink: float | None = None
    """StudentCard.match_sink; None: that of the card."""
    recache: int = 0
    """Chunks after which keys and values of all remembered frames are computed again; 0: never."""

    @classmethod
    def parse(cls, text: str) -> "Variant":
        """`POLICY` or `POLICY:setting=value:setting=value`, of SETTINGS.

        Raises ValueError for an unknown policy, setting or value.
        """
        policy, *given = (part.strip() for part in text.split(":"))
        known = (NO_SLOW, *POLICIES, *CHOOSERS)
        if policy not in known:
            raise ValueError(f"policies: {quoted(policy)} is not one of {', '.join(known)}")
        values: dict[str, Any] = {}
        for setting in given:
            name, _, value = setting.partition("=")
            if name not in SETTINGS or name in values:
                raise ValueError(
                    f"policies: {quoted(name)} in {quoted(text)} is not one of {', '.join(SETTINGS)}, each once"
                )
            values[name] = _value(name, value)
        memory = {name: values[name] for name in (*_SIZES, "eviction") if name in values}
        others = {name: value for name, value in values.items() if name not in memory}
        return cls(policy=policy, memory=memory, **others)

    def empty_memory(self, pipeline: Pipeline) -> Memory:
        """Raises ValueError for settings that the student cannot use."""
        if self.policy in CHOOSERS:
            memory = pipeline.empty_memory(**{**self.memory, "policy": "fifo", "eviction": "oldest"})
            if not memory.config.slow:
                raise ValueError(f"slow: 0 latent frames; {self.policy} chooses slow frames")
        elif self.policy == NO_SLOW:
            memory = pipeline.empty_memory(**{**self.memory, "slow": 0})
        else:
            memory = pipeline.empty_memory(**self.memory, policy=self.policy)
        if self.recache:
            memory.check_supports("recache")
        if self.kv_dtype != "auto":
            memory.check_supports("eight bits")
        return memory

    def camera(self, pipeline: Pipeline, style: Style, seed: int) -> Camera:
        """The camera that generates under this row."""
        if self.match_sink is not None:
            card = dataclasses.replace(pipeline.card, match_sink=self.match_sink)
            pipeline = dataclasses.replace(pipeline, card=card)
        options = SamplerOptions(commit_attends=self.commit_attends, kv_dtype=self.kv_dtype)
        if self.policy in CHOOSERS:
            return ChoosingCamera(pipeline, style, seed, CHOOSERS[self.policy], options, self.recache)
        return Camera(pipeline, style, seed, options, self.recache)


def _value(name: str, text: str) -> int | float | str:
    """The value of a setting. Raises ValueError for one that the setting cannot have."""
    if name in _WORDS:
        if text not in _WORDS[name]:
            raise ValueError(f"policies: {name} {quoted(text)} is not one of {', '.join(_WORDS[name])}")
        return text
    if name == "match_sink":
        if not re.fullmatch(r"0(\.\d+)?|1(\.0+)?", text):
            raise ValueError(f"policies: {name} {quoted(text)} is not a share; it must be a number in [0, 1]")
        return float(text)
    if not (text.isascii() and text.isdigit()):
        raise ValueError(f"policies: {name} {quoted(text)} is not a whole number")
    return int(text)
