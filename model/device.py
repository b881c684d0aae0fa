"""Names of devices and dtypes, for the command line, evaluation and training."""

import os
from collections.abc import Sequence

import torch
from torch import nn

from ..memory.fields import brief, quoted

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}

COMPUTE_DTYPES = ("bf16", "fp32")
"""Those that a student computes in."""

SMALL_NETWORK = 50_000_000
"""Parameters of a network below which several CPU threads spend more time waiting for each other than computing."""


def pick_device(device: str, dtype: str = "auto") -> tuple[torch.device, torch.dtype]:
    """Device and compute dtype by name. `auto` is CUDA in bf16 if it is available, else the CPU in fp32.

    Raises ValueError for an unknown name, and for `cuda` without a CUDA device.
    """
    if device not in ("auto", "cuda", "cpu"):
        raise ValueError(f"device: {quoted(device)} is not one of auto, cuda, cpu")
    has_cuda = torch.cuda.is_available()
    if device == "cuda" and not has_cuda:
        raise ValueError("device: cuda is not available in this torch; use cpu, or install a CUDA build of torch")
    chosen = torch.device("cuda" if has_cuda and device != "cpu" else "cpu")
    if dtype == "auto":
        return chosen, DTYPES["bf16" if chosen.type == "cuda" else "fp32"]
    return chosen, dtype_named(dtype, COMPUTE_DTYPES)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether the memory of a device or of the machine is at its end."""
    if isinstance(error, (MemoryError, torch.cuda.OutOfMemoryError)):
        return True
    # torch has no class of its own for the CPU and for MPS, and `load_state_dict` tells of errors in its own.
    # CUDA's libraries have error codes of theirs for what they cannot allocate.
    texts = "DefaultCPUAllocator", "out of memory", "STATUS_ALLOC_FAILED"
    return isinstance(error, RuntimeError) and any(text in str(error) for text in texts)


def out_of_memory(error: BaseException) -> str:
    """What a user reads of it where nothing else can be done."""
    return f"out of memory ({brief(error)}); close other programs, or choose a smaller size, model or batch"


def dtype_named(name: str, choices: Sequence[str] = tuple(DTYPES)) -> torch.dtype:
    """A dtype by its short name. Raises ValueError unless it is one of `choices`."""
    if name not in choices:
        raise ValueError(f"dtype: {quoted(name)} is not one of {', '.join(choices)}")
    return DTYPES[name]


def name_of_dtype(dtype: torch.dtype) -> str:
    """The short name of a dtype."""
    return next(name for name, known in DTYPES.items() if known == dtype)


def use_cpu_threads(net: nn.Module) -> None:
    """Limit torch's CPU threads for inference beside a video encoder, which needs a core of its own.

    A small network gets one thread, a larger one all cores but one. The environment variable OMP_NUM_THREADS and a
    lower `torch.set_num_threads` win.
    """
    if "OMP_NUM_THREADS" not in os.environ:
        is_small = sum(parameter.numel() for parameter in net.parameters()) < SMALL_NETWORK
        cores = 1 if is_small else max(1, (os.cpu_count() or 1) - 1)
        torch.set_num_threads(min(cores, torch.get_num_threads()))
