"""Thin ComfyUI nodes (V3): gluing only; what is computed stands in model/ and memory/."""

from comfy_api.latest import ComfyExtension, io

from .consistency import ContextForcingConsistency
from .load import ContextForcingLoadDemo, ContextForcingLoadStudent
from .memory import ContextForcingMemory, ContextForcingMemoryReport
from .remember import ContextForcingRemember
from .sampler import ContextForcingSampler
from .settings import ContextForcingStudentSettings
from .snapshot import ContextForcingLoadMemory, ContextForcingSaveMemory
from .storyboard import ContextForcingStoryboard
from .video import ContextForcingSaveVideo

NODES: list[type[io.ComfyNode]] = [
    ContextForcingLoadDemo,
    ContextForcingLoadStudent,
    ContextForcingMemory,
    ContextForcingRemember,
    ContextForcingSampler,
    ContextForcingStoryboard,
    ContextForcingSaveVideo,
    ContextForcingMemoryReport,
    ContextForcingConsistency,
    ContextForcingSaveMemory,
    ContextForcingLoadMemory,
    ContextForcingStudentSettings,
]


class ContextForcingExtension(ComfyExtension):
    """The node pack."""

    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        return NODES
