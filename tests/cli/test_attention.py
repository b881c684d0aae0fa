"""`generate --attention`, with a stand-in for the package of the kernel."""

import dataclasses
import sys
from types import ModuleType

import pytest
import torch
import yaml

from context_forcing.model.attention import BACKENDS
from context_forcing.video.provenance import read_provenance

STORY = {"size": [48, 32], "seed": 4, "segments": [{"prompt": "a meadow by day", "seconds": 0.75}]}


@pytest.fixture
def generate(run, student, tmp_path, monkeypatch):
    """(what flash_attn_func makes of exact attention) -> exit code, stderr, its calls."""

    def generate(change):
        def flash_attn_func(q, k, v, dropout_p=0.0, softmax_scale=None, causal=False):
            calls.append(k.shape[1])
            scores = torch.einsum("bsne,bkne->bnsk", q.float(), k.float()) * q.shape[-1] ** -0.5
            return change(torch.einsum("bnsk,bkne->bsne", scores.softmax(-1), v.float())).to(q)

        calls, package = [], ModuleType("flash_attn")
        package.flash_attn_func = flash_attn_func
        monkeypatch.setitem(sys.modules, "flash_attn", package)
        monkeypatch.setitem(BACKENDS, "flash", dataclasses.replace(BACKENDS["flash"], devices=("cpu",)))
        (tmp_path / "story.yaml").write_text(yaml.safe_dump(STORY))
        options = ["--student", student, "--attention", "flash", "--dtype", "bf16"]
        return *run("generate", tmp_path / "story.yaml", "-o", tmp_path / "film.mp4", *options), calls

    return generate


def test_it_computes_the_film_and_is_named_in_it(generate, succeeded, tmp_path):
    *result, calls = generate(lambda out: out)
    succeeded(result)
    tokens = 3 * 3 * 2
    assert len(calls) == 1 + 2 * 2 + 1 and set(calls[1:]) == {tokens}, "self-test; two layers in two steps; a commit"
    made = read_provenance(tmp_path / "film.mp4")
    assert made.attention == "flash" and made.libraries.endswith("flash_attn of unknown version")


def test_one_that_computes_wrong_is_refused_before_anything_is_written(generate, refused, tmp_path):
    *result, calls = generate(lambda out: out.roll(1, dims=2))
    refused(result, "attention", "flash", "differs from sdpa", "use another version")
    assert len(calls) == 1 and [path.name for path in tmp_path.iterdir()] == ["story.yaml"]
