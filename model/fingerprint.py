"""One name for a network's weights, whatever they are stored in, run in, or wrapped in."""

import hashlib
from collections.abc import Mapping
from types import MappingProxyType

from torch import Tensor, nn

SIGNS = 4096
"""Weights of a tensor, evenly spread, that its student is told from others by."""

WEIGHTS = ("weight", "bias", "modulation")
"""What Wan's own tensors end in; scales that a quantised layer keeps beside them do not count."""

COMPILED = "_orig_mod."
"""What torch.compile puts into the names of a module's parameters."""


def fingerprint(net: nn.Module, instead: Mapping[str, Tensor] = MappingProxyType({})) -> str:
    """Short name of a network's weights: equal keys mean equal fingerprints. Works on any tree with Wan's names.

    `instead` are weights that count in place of those in the tree. Bytes stand for packed weights of 4 to 6 bits: such
    a file has a name of its own.
    """
    digest = hashlib.sha256()
    parameters = {name.replace(COMPILED, ""): parameter for name, parameter in net.named_parameters()}
    for name in sorted(name for name in parameters if name.rpartition(".")[2] in WEIGHTS):
        shape = tuple(parameters[name].shape)
        flat = instead.get(name, parameters[name]).detach().as_subclass(Tensor).flatten()
        sample = flat[:: max(1, flat.numel() // SIGNS)].cpu()
        # Signs: a student has one name in every precision it is stored or run in.
        sample = sample.float().signbit() if sample.dtype.is_signed else sample
        digest.update(f"{name}{shape}".encode())
        digest.update(sample.numpy().tobytes())
    return digest.hexdigest()[:16]
