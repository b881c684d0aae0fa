"""What is remembered of a video. Depends on torch and safetensors only."""

from .config import MemoryConfig
from .memory import Memory, empty_memory
from .view import MemoryView

__all__ = ["Memory", "MemoryConfig", "MemoryView", "empty_memory"]
