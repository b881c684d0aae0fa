"""The page that runs a prompt: what it shows on a node while the node runs, and what follows in its graph."""

import functools
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
        parent: str | None = node
        while parent is not None:
            if users := self._users.get(parent):
                return users
            parent = self.graph.get_parent_node_id(parent)
        return []

    def seconds_after(self, node: str) -> float:
        """Seconds of the samplers that continue the memory of a node, along the longest branch."""
        seconds, waiting = {node: 0.0}, [node]
        while waiting:  # a chain of segments can be longer than Python's recursion limit
            before = waiting.pop()
            for user in self.users(before):
                if self._type(user) == SAMPLER:
                    after = seconds[before] + self._seconds(user)
                    if after > seconds.get(user, -1.0):
                        seconds[user] = after
                        waiting.append(user)
        return max(seconds.values())

    def save_nodes(self, node: str) -> list[str]:
        """The Save Long Video nodes that will write the memory of a node, or one that continues it."""
        found, seen, waiting = [], {node}, [node]
        while waiting:
            for user in self.users(waiting.pop()):
                if user in seen:
                    continue
                seen.add(user)
                if self._type(user) == SAVE_VIDEO:
                    found.append(user)
                elif self._type(user) in (SAMPLER, STORYBOARD):
                    waiting.append(user)
        return found

    @functools.cached_property
    def _users(self) -> dict[str, list[str]]:
        """The users of the first output of every node, as the graph is when this is first asked."""
        users: dict[str, list[str]] = {}
        for user in sorted(self.graph.all_node_ids()):
            links = (value for value in self._inputs(user).values() if isinstance(value, list) and len(value) == 2)
            for source in {source for source, output in links if isinstance(source, str) and output == 0}:
                users.setdefault(source, []).append(user)
        return users

    def _seconds(self, sampler: str) -> float:
        seconds = self._inputs(sampler)["seconds"]
        return 0.0 if isinstance(seconds, list) else float(seconds)  # the value of a link is not known yet

    def _inputs(self, node: str) -> dict[str, Any]:
        return self.graph.get_node(node)["inputs"]

    def _type(self, node: str) -> str:
        return self.graph.get_node(node)["class_type"]
