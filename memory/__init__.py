"""What is remembered of a video. Depends on torch and safetensors only.

Names are imported when they are used: settings and messages need no torch, so the command line begins fast.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .config import MemoryConfig
    from .memory import Memory, empty_memory
    from .view import MemoryView

__all__ = ["Memory", "MemoryConfig", "MemoryView", "empty_memory"]
MODULES = {"Memory": "memory", "MemoryConfig": "config", "MemoryView": "view", "empty_memory": "memory"}


def __getattr__(name: str) -> Any:
    if name not in MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{MODULES[name]}", __name__), name)
