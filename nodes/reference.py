"""References: pictures that are remembered and are not in the video."""

from comfy_api.latest import io

from ..memory.references import Reference
from ..model.segment import used_rows
from .demo import WORDS
from .handle import MemoryHandle, MemoryType
from .sampler import text_of
from .shared import CATEGORY
from .start import clean_latents, encode_images


class ContextForcingReference(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="ContextForcingReference", display_name="Reference Image", category=CATEGORY,
            description="Pins pictures of a character or a place to an empty memory. They are remembered to the end,"
            " also through cuts, and are not in the video. Chain the node for pictures with other prompts.",
            search_aliases=["context forcing", "character", "reference", "ip adapter", "subject", "pin"],
            inputs=[
                MemoryType.Input("memory", tooltip="An empty memory. Each picture takes one of its sink frames."),
                io.Vae.Input("vae", tooltip="Encodes the pictures: the demo codec, or a Wan 2.1 VAE."),
                io.Image.Input("images",
                    tooltip="One or more pictures, each a reference of its own. They are resized and cropped to the"
                    " memory's size."),
                io.Conditioning.Input("positive", optional=True,
                    tooltip="What the pictures show. Without it they are read under the prompt of the first sampler."),
            ],
            outputs=[MemoryType.Output("memory", tooltip="For the first sampler, or a node before it.")],
        )  # fmt: skip

    @classmethod
    def execute(
        cls, memory: MemoryHandle, vae: io.Vae.Type, images: io.Image.Type,
        positive: io.Conditioning.Type | None = None,
    ) -> io.NodeOutput:  # fmt: skip
        before, text, prompt = memory.memory, None, ""
        if positive is not None:
            text, prompt = used_rows(text_of(positive)), positive[0][1].get(WORDS, "")
        # One at a time: the frames of one batch would be a video.
        latents = (clean_latents(encode_images(vae, image[None], before)) for image in images)
        references = [Reference(latents=each, prompt=prompt, text=text) for each in latents]
        return io.NodeOutput(MemoryHandle.of(before.with_references(references), before))
