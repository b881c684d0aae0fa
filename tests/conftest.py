import pytest
import torch


@pytest.fixture(autouse=True)
def _no_global_randomness():
    torch.manual_seed(0)
