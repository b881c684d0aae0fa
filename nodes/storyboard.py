"""A whole chain of samplers in one node: timed prompts, one line a segment."""

from comfy_api.latest import io
from comfy_execution.graph_utils import GraphBuilder

from ..model.sampler import KV_PLACEMENTS
from ..video.storyboard import chunk_story, parse_storyboard, write_storyboard
from .handle import CATEGORY, MemoryType, card_of
from .patches import ATTENTIONS
from .save_load import PLACES

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
    def define_schema(cls):
        return io.Schema(
            node_id="ContextForcingStoryboard",
            display_name="Context Forcing Storyboard",
            category=CATEGORY,
            description="A whole chain of samplers in one node: write timed prompts, one line a segment. Change a line,"
            " and only its segment and the later ones are made again.",
            search_aliases=["context forcing", "prompt schedule", "timeline", "long video", "chain", "script"],
            enable_expand=True,
            hidden=[io.Hidden.dynprompt, io.Hidden.unique_id],
            inputs=[
                io.Model.Input("model", tooltip="The student."),
                io.Clip.Input("clip", tooltip="Encodes the prompts, as in CLIP Text Encode."),
                MemoryType.Input("memory", tooltip="An empty memory, or the end of a video to go on with."),
                io.String.Input(
                    "text", multiline=True, default=EXAMPLE,
                    tooltip="A line a segment: the time at which it begins (0:06, 1:02:03 or 12.5 seconds), if wanted"
                    " [keep, recache, flush, cut or cut_new_sink, seed=N, blend=N], and the prompt. The last line is"
                    " only a time: the end. Times go to the nearest whole chunk (0.75 s at 16 frames per second). Lines"
                    " that begin with # are not read.",
                ),
                io.Int.Input(
                    "seed", default=0, min=0, max=2**63 - 1, control_after_generate=io.ControlAfterGenerate.fixed,
                    tooltip="For every line without a seed=N of its own.",
                ),
                io.Combo.Input(
                    "attention", options=list(ATTENTIONS), default="sdpa", optional=True, advanced=True,
                    tooltip="As in the sampler. sdpa: exact. comfyui: what ComfyUI was started with.",
                ),
                io.Combo.Input(
                    "keep_in", options=list(PLACES), default="RAM", optional=True, advanced=True,
                    tooltip="Where memories rest between segments, as in the sampler. RAM: always right. GPU: spares"
                    " copying. compact: the least, close but not the same to the bit.",
                ),
                io.Boolean.Input(
                    "autosave", default=False, optional=True, advanced=True,
                    tooltip="Also write the memory to output/context_forcing after every segment, and after an"
                    " interrupt.",
                ),
                io.Combo.Input(
                    "layout", options=list(KV_PLACEMENTS), default="at once", optional=True, advanced=True,
                    tooltip="As in the sampler. at once: fastest. by layer: half the video memory for what is"
                    " remembered. from RAM: the least, slow.",
                ),
            ],
            outputs=[
                MemoryType.Output("memory", tooltip="The end of the chain: for Save Long Video, a report or a sampler."),
                io.String.Output("text", tooltip="What was made: the storyboard with its times on whole chunks."),
            ],
        )  # fmt: skip

    @classmethod
    def validate_inputs(cls, text):
        # None: it comes over a wire, and is checked when it is there.
        if text is not None:
            try:
                parse_storyboard(text)
            except ValueError as error:
                return str(error)
        return True

    @classmethod
    def execute(
        cls, model, clip, memory, text, seed, attention="sdpa", keep_in="RAM", autosave=False, layout="at once"
    ) -> io.NodeOutput:
        story = chunk_story(parse_storyboard(text), card_of(model).fps, memory.memory.config.chunk, seed)
        # Samplers take the wires, not what came over them: so ComfyUI finds those of unchanged lines in its cache.
        wires = cls.hidden.dynprompt.get_node(cls.hidden.unique_id)["inputs"]
        graph, end = GraphBuilder(), wires["memory"]
        for scene in story.segments:
            prompt = graph.node("CLIPTextEncode", clip=wires["clip"], text=scene.prompt)
            sampler = graph.node(
                "ContextForcingSampler", model=wires["model"], positive=prompt.out(0), memory=end,
                seconds=scene.seconds, seed=seed if scene.seed is None else scene.seed, change=scene.change,
                blend=scene.blend, attention=attention, keep_in=keep_in, autosave=autosave,
                layout=layout,
            )  # fmt: skip
            end = sampler.out(0)
        return io.NodeOutput(end, write_storyboard(story), expand=graph.finalize())
