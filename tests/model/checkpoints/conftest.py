import pytest
import torch

from .published import SIZES


@pytest.fixture(scope="session")
def state(make_net):
    """Weights of a small student. They are whole in bfloat16."""
    return {name: tensor.to(torch.bfloat16).float() for name, tensor in make_net(**SIZES).state_dict().items()}
