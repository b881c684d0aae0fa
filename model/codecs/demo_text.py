"""The text encoder of the demo student (docs/demo_student.md, Text): it has no weights, and Wan's output shape.

The demo student was trained on a few concepts, each with many spellings. A prompt becomes one row per concept in
[512, 4096], padded with zeros like the output of UMT5. A row is drawn from a hash of its concept, so it is the same on
every machine and in every version.
"""

import hashlib
import logging
import re

import torch
from torch import Tensor

log = logging.getLogger("context_forcing")

TEXT_LEN, TEXT_DIM = 512, 4096

CONCEPTS: dict[str, str] = {
    "meadow": "meadow meadows grass grassy grassland pasture prairie",
    "desert": "desert deserts sand sandy dune dunes",
    "snow": "snow snowy snowfield winter wintry arctic",
    "clear": "clear sunny cloudless bright",
    "cloudy": "cloudy cloud clouds clouded overcast",
    "foggy": "foggy fog mist misty haze hazy",
    "day": "day daytime daylight noon midday morning afternoon",
    "dusk": "dusk sunset sundown twilight evening",
    "night": "night nighttime midnight moonlight moonlit",
    "stay": "stay stays staying static still stationary fixed stands stops halts rests",
    "pan": "pan pans panning panned move moves moving turn turns turning rotates rotating swings slides",
    "left": "left leftward leftwards",
    "right": "right rightward rightwards",
}
"""Every concept of the demo world with its spellings."""

WORDS: dict[str, str] = {spelling: concept for concept, line in CONCEPTS.items() for spelling in line.split()}

_FILLERS = frozenset(
    "a an and at by camera field for from in into is it its of on over sky slowly the then this to towards under view"
    " while with".split()
)


def canonical_words(prompt: str) -> list[str]:
    """The concepts in a prompt, in order and with repetitions; unknown words are dropped."""
    return [WORDS[word] for word in re.findall(r"[a-z]+", prompt.lower()) if word in WORDS]


def unknown_words(prompt: str) -> list[str]:
    """Words in a prompt that the demo student was not trained on; they have no effect."""
    words = re.findall(r"[a-z]+", prompt.lower())
    return [word for word in dict.fromkeys(words) if word not in WORDS and word not in _FILLERS]


def concept_embedding(concept: str) -> Tensor:
    """A fixed row [4096] of zero mean and unit variance."""
    raw = hashlib.shake_256(concept.encode()).digest(TEXT_DIM)
    values = torch.frombuffer(bytearray(raw), dtype=torch.uint8).float()
    return (values - 127.5) / 73.9


def encode_demo_text(prompt: str) -> Tensor:
    """Prompt -> text embeddings [1, 512, 4096]; prompts with the same concepts give the same embeddings."""
    rows = torch.zeros(1, TEXT_LEN, TEXT_DIM)
    for i, concept in enumerate(sorted(set(canonical_words(prompt)))):
        rows[0, i] = concept_embedding(concept)
    return rows


class DemoTextEncoder:
    """Logs a warning for unknown words."""

    name = "demo"

    def encode(self, prompt: str) -> Tensor:
        if unknown := unknown_words(prompt):
            log.warning(
                "prompt: the demo student was not trained on %s; these words have no effect", ", ".join(unknown)
            )
        return encode_demo_text(prompt)
