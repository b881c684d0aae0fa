"""What is remembered. Pure torch; knows nothing of nodes, command line or training."""

from .config import MemoryConfig
from .memory import Memory
from .view import MemoryView

__all__ = ["Memory", "MemoryConfig", "MemoryView"]
