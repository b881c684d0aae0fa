"""A short name for the weights of a network, independent of storage, dtype and wrappers."""

import hashlib
from collections.abc import Mapping
from types import MappingProxyType

from torch import Tensor, nn

SIGNS = 4096
"""Weights of each tensor that count, evenly spread."""

WEIGHTS = ("weight", "bias", "modulation")
"""Last parts of the names of Wan's tensors. Scales of quantised layers do not count."""

COMPILED = "_orig_mod."
"""torch.compile adds this to the names of a module's parameters."""


def fingerprint(
    net: nn.Module, instead: Mapping[str, Tensor] = MappingProxyType({}), commit: nn.Module | None = None
) -> str:
    """Fingerprint of a network with Wan's names; `instead` has weights that replace those of the network.

    `commit` is the network of the commit pass if it has weights of its own. Packed weights of 4 to 6 bits count as
    bytes, so such a file has another fingerprint.
    """
    digest = hashlib.sha256()
    _add(digest, net, instead)
    if commit is not None:
        _add(digest, commit, {})
    return digest.hexdigest()[:16]


def _add(digest: "hashlib._Hash", net: nn.Module, instead: Mapping[str, Tensor]) -> None:
    parameters = {name.replace(COMPILED, ""): parameter for name, parameter in net.named_parameters()}
    for name in sorted(name for name in parameters if name.rpartition(".")[2] in WEIGHTS):
        shape = tuple(parameters[name].shape)
        flat = instead.get(name, parameters[name]).detach().as_subclass(Tensor).flatten()
        sample = flat[:: max(1, flat.numel() // SIGNS)].cpu()
        # Signs do not depend on the dtype in which a student is stored or runs.
        sample = sample.float().signbit() if sample.dtype.is_signed else sample
        digest.update(f"{name}{shape}".encode())
        digest.update(sample.numpy().tobytes())
