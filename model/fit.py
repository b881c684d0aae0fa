"""Which placements of keys and values fit into the memory of a device."""

import logging

import torch

from ..memory.memory import Memory
from ..memory.stores import KV_PLACEMENTS
from .network import Network
from .sampler import working_bytes

log = logging.getLogger("context_forcing")


def free_bytes(device: torch.device) -> int | None:
    """Bytes that a process can still allocate on a CUDA device; None for other devices."""
    if device.type != "cuda":
        return None
    cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + cached


def placements_that_fit(network: Network, memory: Memory, free: int, kv_dtype: str = "auto") -> tuple[list[str], str]:
    """The placements that fit beside the loaded weights, fastest first, and a line that says so with all sizes."""
    needed = {name: working_bytes(network, memory, name, kv_dtype=kv_dtype) for name in KV_PLACEMENTS}
    fits = [name for name, size in needed.items() if size <= free]
    listed = lambda names: ", ".join(f"{name} {needed[name] / 1e9:.1f} GB" for name in names) or "none"
    others = [name for name in needed if name not in fits]
    return fits, f"{free / 1e9:.1f} GB free beside the weights; fits: {listed(fits)}; does not: {listed(others)}"


def say_what_fits(network: Network, memory: Memory, kv_placement: str, kv_dtype: str = "auto") -> None:
    """Log which placements fit the device of a loaded network, and warn if the chosen one does not."""
    free = free_bytes(network.device)
    if free is None:
        return
    fits, line = placements_that_fit(network, memory, free, kv_dtype)
    log.info("memory: %s", line)
    if kv_placement not in fits:
        remedy = f"--kv-placement '{fits[0]}' makes the same video" if fits else "choose a smaller size"
        log.warning("--kv-placement: '%s' does not fit; %s", kv_placement, remedy)
