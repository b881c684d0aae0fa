"""What is remembered. Pure torch; knows nothing of nodes, command line or training."""

from .config import MemoryConfig
from .layer_store import ReleasedMemory, empty_memory
from .memory import Memory
from .view import MemoryView

__all__ = ["Memory", "MemoryConfig", "MemoryView", "ReleasedMemory", "empty_memory"]
