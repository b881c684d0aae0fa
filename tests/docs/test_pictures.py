"""docs/memory_policies.svg shows what the policies do."""

from pathlib import Path

import pytest

from context_forcing.memory.config import MemoryConfig
from context_forcing.memory.policy import Slots, advance

PICTURE = Path(__file__).parents[2] / "docs" / "memory_policies.svg"
WALK = [*range(13, 19), *range(17, 11, -1)]
PLACES = [0] * 9 + list(range(1, 13)) + [12] * 9 + WALK + WALK + [12] * 3
"""Where the camera looks in each latent frame of the picture: it stays, walks, stays, walks to and fro."""
ROWS = ("novel", "clean", "uniform", "fifo")
COLOURS = {"sink": "#c77712", "slow": "#17876d", "fast": "#2160c4"}


def remembered(policy):
    def similarity(frame, others):
        return [max(0.0, 1 - 0.08 * abs(PLACES[frame] - PLACES[other])) for other in others]

    slots, config = Slots(), MemoryConfig(policy=policy)
    for first in range(0, len(PLACES), 3):
        slots, _ = advance(slots, config, range(first, first + 3), similarity)
    return slots


@pytest.mark.parametrize("policy", ROWS)
def test_each_row_is_what_the_policy_remembers(policy):
    text, slots = PICTURE.read_text(), remembered(policy)
    _, row = text.split(f">{policy}</text>")
    row = row.split("</text>")[0]
    for part, colour in COLOURS.items():
        assert row.count(colour) == len(getattr(slots, part)), part
    assert f">{len({PLACES[frame] for frame in slots.all})} places<" in f"{row}<"
