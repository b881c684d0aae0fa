"""The page that runs a prompt: what it shows on a node while the node runs, and what follows in its graph."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from comfy_api.latest import io, ui
from comfy_execution.progress import get_progress_state
from comfy_execution.utils import get_executing_context
from server import PromptServer

SAMPLER, STORYBOARD, SAVE_VIDEO = "ContextForcingSampler", "ContextForcingStoryboard", "ContextForcingSaveVideo"


@dataclass(frozen=True)
class Page:
    """The page that runs the prompt of the current node. Nothing here changes what ComfyUI's cache keeps."""

    prompt_id: str
    node: str
    """Id of the current node; in a storyboard, of a node that the page does not have."""
    graph: Any
    """comfy_execution.graph.DynamicPrompt."""

    @classmethod
    def current(cls) -> "Page | None":
        """None if no page is connected, or outside a server."""
        context = get_executing_context()
        if context is None or PromptServer.instance.client_id is None:
            return None
        return cls(context.prompt_id, context.node_id, get_progress_state().dynprompt)

    def show_text(self, text: str) -> None:
        """Show a line of text on the current node."""
        server = PromptServer.instance
        server.send_progress_text(text, self.graph.get_display_node_id(self.node), server.client_id)

    def show_video(self, node: str, name: str) -> None:
        """Show a video of the temporary folder on a node that has not run."""
        shown = ui.PreviewVideo([ui.SavedResult(name, "", io.FolderType.temp)]).as_dict()
        data = {"node": node, "display_node": node, "output": shown, "prompt_id": self.prompt_id}
        PromptServer.instance.send_sync("executed", data, PromptServer.instance.client_id)

    def users(self, node: str) -> list[str]:
        """Nodes that take the first output of a node. The last segment's of a storyboard is the storyboard's."""
        users = [user for user in sorted(self.graph.all_node_ids()) if [node, 0] in self._inputs(user).values()]
        parent = self.graph.get_parent_node_id(node)
        return self.users(parent) if not users and parent is not None else users

    def seconds_after(self, node: str) -> float:
        """Seconds of the samplers that continue the memory of a node, along the longest branch."""
        samplers = [user for user in self.users(node) if self._type(user) == SAMPLER]
        return max((self._seconds(sampler) + self.seconds_after(sampler) for sampler in samplers), default=0.0)

    def save_nodes(self, node: str) -> Iterator[str]:
        """The Save Long Video nodes that will write the memory of a node, or one that continues it."""
        for user in self.users(node):
            if self._type(user) == SAVE_VIDEO:
                yield user
            elif self._type(user) in (SAMPLER, STORYBOARD):
                yield from self.save_nodes(user)

    def _seconds(self, sampler: str) -> float:
        seconds = self._inputs(sampler)["seconds"]
        return 0.0 if isinstance(seconds, list) else float(seconds)  # the value of a link is not known yet

    def _inputs(self, node: str) -> dict[str, Any]:
        return self.graph.get_node(node)["inputs"]

    def _type(self, node: str) -> str:
        return self.graph.get_node(node)["class_type"]
