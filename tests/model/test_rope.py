"""Rotary positions: Wan's layout, relative, and without a last position."""

import numpy as np
import pytest
import torch

from context_forcing.model.rope import rotary_table, rotate

ROWS, COLUMNS = 3, 5


def reference(x, positions):
    """docs/method.md, Rotary positions, in complex128, token by token; x [T, P, N, E]."""
    head_dim = x.shape[-1]
    spatial = 2 * (head_dim // 6)
    temporal = head_dim - 4 * (head_dim // 6)
    frequencies = lambda d: np.array([10000 ** (-2 * j / d) for j in range(d // 2)])
    out = np.empty(x.shape)
    for t, position in enumerate(positions):
        for p in range(x.shape[1]):
            row, column = divmod(p, COLUMNS)
            angle = np.concatenate(
                [position * frequencies(temporal), row * frequencies(spatial), column * frequencies(spatial)]
            )
            pairs = x[t, p].double().numpy()
            turned = (pairs[:, 0::2] + 1j * pairs[:, 1::2]) * np.exp(1j * angle)
            out[t, p, :, 0::2], out[t, p, :, 1::2] = turned.real, turned.imag
    return torch.from_numpy(out)


def random(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("head_dim", [32, 64, 128])
@pytest.mark.parametrize("positions", [[0, 1, 2, 3], [17, 18, 19, 20], [4, 0, 1023, 5000]])
def test_against_a_complex_reference(head_dim, positions):
    x = random(4, ROWS * COLUMNS, 2, head_dim)
    turned = rotate(x, rotary_table(torch.tensor(positions), ROWS, COLUMNS, head_dim))
    assert torch.allclose(turned.double(), reference(x, positions), atol=1e-5)


def test_pairs_at_head_dim_128():
    """22 of time, 21 of rows, 21 of columns."""
    table = lambda position, row, column: rotary_table(torch.tensor([position]), 4, 7, 128)[0, row * 7 + column, 0]
    moved = lambda a, b: (a - b).abs().sum(-1).gt(0).nonzero().flatten().tolist()
    origin = table(0, 0, 0)
    assert torch.equal(origin, torch.tensor([1.0, 0.0]).expand(64, 2))
    assert moved(table(9, 0, 0), origin) == list(range(22))
    assert moved(table(0, 3, 0), origin) == list(range(22, 43))
    assert moved(table(0, 0, 6), origin) == list(range(43, 64))


@pytest.mark.parametrize("shift", [1, 18, 1024, 100_000])
@pytest.mark.parametrize("head_dim", [64, 128])
def test_scores_depend_on_distance_only(head_dim, shift):
    q, k = random(3, ROWS * COLUMNS, 2, head_dim), random(3, ROWS * COLUMNS, 2, head_dim, seed=1)
    at = torch.tensor([0, 1, 7])

    def scores(positions):
        table = rotary_table(positions, ROWS, COLUMNS, head_dim)
        return torch.einsum("tpne,sqne->ntpsq", rotate(q, table), rotate(k, table))

    assert torch.allclose(scores(at), scores(at + shift), atol=1e-4)
    assert not torch.allclose(scores(at), scores(at * 2), atol=1e-2)


def test_positions_of_a_batch():
    x = random(2, 3, ROWS * COLUMNS, 2, 64)
    positions = torch.tensor([[0, 1, 2], [5, 6, 7]])
    together = rotate(x, rotary_table(positions, ROWS, COLUMNS, 64))
    for b in range(2):
        assert torch.equal(together[b], rotate(x[b], rotary_table(positions[b], ROWS, COLUMNS, 64)))


def test_lengths_and_dtype_are_kept():
    x = random(4, ROWS * COLUMNS, 2, 64)
    table = rotary_table(torch.arange(4), ROWS, COLUMNS, 64)
    assert torch.allclose(rotate(x, table).norm(dim=-1), x.norm(dim=-1), rtol=1e-5)
    assert rotate(x.bfloat16(), table).dtype == torch.bfloat16
    assert torch.equal(rotate(x.bfloat16(), table), rotate(x.bfloat16().float(), table).bfloat16())
