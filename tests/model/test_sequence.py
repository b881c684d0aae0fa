"""Two processes that share every pass against one process."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from context_forcing.model.sequence import Processes

SCRIPT = Path(__file__).with_name("sequence_processes.py")


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """Number of processes -> what they computed."""
    folder, found = tmp_path_factory.mktemp("processes"), {}
    for count in (1, 2):
        path = folder / f"{count}.pt"
        torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={count}"] if count > 1 else []
        command = [sys.executable, *torchrun, str(SCRIPT), str(path)]
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
        assert done.returncode == 0, done.stderr[-3000:]
        found[count] = torch.load(path, weights_only=True)
    return found


@pytest.mark.slow
@pytest.mark.parametrize("policy", ["novel", "recall"])
def test_the_film_and_what_is_remembered(results, policy):
    one, two = (results[count][policy] for count in (1, 2))
    torch.testing.assert_close(two["film"], one["film"], rtol=0, atol=1e-5)
    assert one["film"].std() > 0.5
    assert two["slots"] == one["slots"] and len(one["slots"][1]) == 3
    assert set(one["heads"]) == {4} and set(two["heads"]) == {2}
    for mine, theirs in zip(two["similarities"], one["similarities"], strict=True):
        assert mine == (None if theirs is None else pytest.approx(theirs, abs=1e-5))
    assert policy != "novel" or any(value is not None for value in one["similarities"])


@pytest.mark.slow
def test_gradients_through_a_long_clip(results):
    one, two = results[1], results[2]
    torch.testing.assert_close(two["loss"], one["loss"], rtol=1e-5, atol=1e-6)
    assert one["grads"].keys() == two["grads"].keys()
    for name, grad in one["grads"].items():
        assert grad.abs().max() > 0, name
        torch.testing.assert_close(two["grads"][name], grad, rtol=1e-4, atol=1e-5 * grad.abs().max().item(), msg=name)


@pytest.mark.parametrize("heads, tokens, words", [(3, 8, "2 do not divide 3 heads"), (4, 9, "9 tokens per latent")])
def test_sizes_that_do_not_divide_are_refused(heads, tokens, words):
    with pytest.raises(ValueError, match=words):
        Processes(0, 2).check(heads, tokens)
    Processes(0, 2).check(4, 8)
