"""Names of devices and dtypes, for the command line, evaluation and training."""

from collections.abc import Sequence

import torch

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def pick_device(device: str, dtype: str = "auto") -> tuple[torch.device, torch.dtype]:
    """Device and compute dtype by name. `auto` is CUDA in bf16 if it is available, else the CPU in fp32.

    Raises ValueError for an unknown name, and for `cuda` without a CUDA device.
    """
    if device not in ("auto", "cuda", "cpu"):
        raise ValueError(f"device: {device!r} is not one of auto, cuda, cpu")
    has_cuda = torch.cuda.is_available()
    if device == "cuda" and not has_cuda:
        raise ValueError("device: cuda is not available in this torch; use cpu, or install a CUDA build of torch")
    chosen = torch.device("cuda" if has_cuda and device != "cpu" else "cpu")
    if dtype == "auto":
        dtype = "bf16" if chosen.type == "cuda" else "fp32"
        return chosen, DTYPES[dtype]
    return chosen, dtype_named(dtype, ("bf16", "fp32"))


def dtype_named(name: str, choices: Sequence[str] = tuple(DTYPES)) -> torch.dtype:
    """A dtype by its short name. Raises ValueError unless it is one of `choices`."""
    if name not in choices:
        raise ValueError(f"dtype: {name!r} is not one of {', '.join(choices)}")
    return DTYPES[name]
