"""Rows of an evaluation: a policy, and settings that differ from the student's card."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from ...memory.config import EVICTIONS, POLICIES
from ...memory.fields import quoted
from ...memory.memory import Memory
from ...memory.view import ATTENDS
from ...model.sampler import SamplerOptions
from ...video.pipeline import Pipeline
from ..world.prompts import Style
from .choosers import CHOOSERS, ChoosingCamera
from .rollout import Camera

NO_SLOW = "none"
"""The name of no slow memory among policies."""
_SIZES = ("sink", "slow", "fast")
_WORDS = {"commit_attends": ATTENDS, "eviction": EVICTIONS}
SETTINGS = ("recache", *_SIZES, *_WORDS)


@dataclass(frozen=True, kw_only=True)
class Variant:
    """What a student is measured under."""

    policy: str
    """A policy of memories, NO_SLOW, or one of CHOOSERS."""
    memory: Mapping[str, int | str] = field(default_factory=dict)
    """Fields of the memory's config that differ from the card."""
    commit_attends: str | None = None
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
        values: dict[str, int | str] = {}
        for setting in given:
            name, _, value = setting.partition("=")
            if name not in SETTINGS or name in values:
                raise ValueError(
                    f"policies: {quoted(name)} in {quoted(text)} is not one of {', '.join(SETTINGS)}, each once"
                )
            if name in _WORDS and value not in _WORDS[name]:
                raise ValueError(f"policies: {name} {quoted(value)} is not one of {', '.join(_WORDS[name])}")
            if name not in _WORDS and not (value.isascii() and value.isdigit()):
                raise ValueError(f"policies: {name} {quoted(value)} is not a whole number")
            values[name] = value if name in _WORDS else int(value)
        memory = {name: values[name] for name in (*_SIZES, "eviction") if name in values}
        attends = values.get("commit_attends")
        recache = int(values.get("recache", 0))
        return cls(policy=policy, memory=memory, commit_attends=attends and str(attends), recache=recache)

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
        return memory

    def camera(self, pipeline: Pipeline, style: Style, seed: int) -> Camera:
        """The camera that generates under this row."""
        options = SamplerOptions(commit_attends=self.commit_attends)
        if self.policy in CHOOSERS:
            return ChoosingCamera(pipeline, style, seed, CHOOSERS[self.policy], options, self.recache)
        return Camera(pipeline, style, seed, options, self.recache)
