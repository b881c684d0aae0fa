"""A chain of samplers in one node: timed prompts, one line per segment."""

import sys

from comfy_api.latest import io
from comfy_execution.graph_utils import GraphBuilder

from ..video.storyboard import chunk_story, parse_storyboard, write_storyboard
from .handle import MemoryHandle, MemoryType
from .model_access import StudentModel
from .shared import ADVANCED, CATEGORY, attention_input, kv_dtype_input, seed_input, storage_inputs

SPARE_CALLS = 100
"""Calls that Python has left for ComfyUI and for the nodes before the storyboard: ComfyUI's cache goes from the last
sampler to the first by a call in a call (CacheKeySetInputSignature)."""
EXAMPLE = """\
# when a segment begins, [how its prompt takes over], its prompt
0:00 A meadow under a clear sky by day. The camera stays.
0:03 A meadow under a clear sky by day. The camera pans right.
0:06 [recache blend=2] A meadow under a clear sky at dusk. The camera stays.
0:09 A meadow under a clear sky at dusk. The camera pans left.
# where the video ends
0:12
"""


class ContextForcingStoryboard(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="ContextForcingStoryboard", display_name="Context Forcing Storyboard", category=CATEGORY,
            description="A chain of samplers in one node. The text has one timed prompt per line. After a change only"
            " the changed line and later lines are generated again.",
            search_aliases=["context forcing", "prompt schedule", "timeline", "long video", "chain", "script"],
            enable_expand=True,
            hidden=[io.Hidden.dynprompt, io.Hidden.unique_id],
            inputs=[
                io.Model.Input("model", tooltip="Student model."),
                io.Clip.Input("clip", tooltip="Encodes the prompts, as in CLIP Text Encode."),
                MemoryType.Input("memory", tooltip="An empty memory, or the memory of a video to continue."),
                io.String.Input("text", multiline=True, default=EXAMPLE,
                    tooltip="One line per segment: the time at which it begins (0:06, 1:02:03 or 12.5 seconds), options"
                    " in brackets [keep, recache, flush, cut or cut_new_sink, seed=N, blend=N], and the prompt. The"
                    " last line is only a time: the end. Times are rounded to whole chunks (0.75 s at 16 fps)."
                    " Lines that begin with # are comments."),
                seed_input("Seed of every line that has no seed=N."),
                attention_input(),
                *storage_inputs(),
                io.Int.Input("branch_after", default=0, min=0, max=1000, **ADVANCED,
                    tooltip="Number of the segment, from 1, whose memory the output branch has. 0: the last segment."),
                kv_dtype_input(),
            ],
            outputs=[
                MemoryType.Output("memory", tooltip="The memory after the last segment."),
                io.String.Output("text", tooltip="The storyboard with its times on whole chunks."),
                MemoryType.Output("branch", tooltip="The memory after the segment branch_after, for another future."),
            ],
        )  # fmt: skip

    @classmethod
    def validate_inputs(cls, attention: str = "sdpa") -> bool:
        """A graph may name an attention that is not installed here. The sampler then says how to get it."""
        return True

    @classmethod
    def execute(
        cls, model: io.Model.Type, clip: io.Clip.Type, memory: MemoryHandle, text: str, seed: int,
        branch_after: int = 0, **options: str | bool,
    ) -> io.NodeOutput:  # fmt: skip
        """`options` are inputs of the samplers.

        The text is checked here: ComfyUI's page shows no reason for what `validate_inputs` refuses.
        """
        card = StudentModel.of(model).card
        story = chunk_story(parse_storyboard(text), card.fps, memory.memory.config.chunk, seed)
        if (count := len(story.segments)) > (most := sys.getrecursionlimit() - SPARE_CALLS):
            raise ValueError(
                f"text: {count} segments are more than {most}, which ComfyUI's cache takes in one storyboard; move the"
                " rest to a second storyboard that continues the memory of this one"
            )
        # The samplers take links, not values: ComfyUI then finds the samplers of unchanged lines in its cache.
        links = cls.hidden.dynprompt.get_node(cls.hidden.unique_id)["inputs"]
        if branch_after > len(story.segments):
            raise ValueError(
                f"branch_after: {branch_after} is too large, there are {len(story.segments)} segments; 0 is the last"
            )
        graph, ends = GraphBuilder(), [links["memory"]]
        for segment in story.resolve(card, memory.memory).segments:
            prompt = graph.node("CLIPTextEncode", clip=links["clip"], text=segment.prompt)
            sampler = graph.node(
                "ContextForcingSampler", model=links["model"], positive=prompt.out(0), memory=ends[-1],
                seconds=segment.seconds, seed=segment.seed, change=segment.change, blend=segment.blend, **options,
            )  # fmt: skip
            ends.append(sampler.out(0))
        return io.NodeOutput(ends[-1], write_storyboard(story), ends[branch_after or -1], expand=graph.finalize())
