"""ComfyUI nodes (V3 schema). They connect ComfyUI's types to model/, memory/ and video/, and compute nothing."""

from comfy_api.latest import ComfyExtension, io

from .consistency import ContextForcingConsistency
from .loaders import ContextForcingLoadDemo, ContextForcingLoadStudent
from .memory import ContextForcingMemory, ContextForcingMemoryReport
from .reference import ContextForcingReference
from .sampler import ContextForcingSampler
from .save_load import ContextForcingLoadMemory, ContextForcingSaveMemory
from .start import ContextForcingRemember
from .storyboard import ContextForcingStoryboard
from .storyboard_route import add_routes
from .student_settings import ContextForcingStudentSettings
from .video import ContextForcingSaveVideo


class ContextForcingExtension(ComfyExtension):
    """The node pack."""

    async def on_load(self) -> None:
        add_routes()

    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        return [
            ContextForcingLoadDemo,
            ContextForcingLoadStudent,
            ContextForcingMemory,
            ContextForcingRemember,
            ContextForcingReference,
            ContextForcingSampler,
            ContextForcingStoryboard,
            ContextForcingSaveVideo,
            ContextForcingMemoryReport,
            ContextForcingConsistency,
            ContextForcingSaveMemory,
            ContextForcingLoadMemory,
            ContextForcingStudentSettings,
        ]
