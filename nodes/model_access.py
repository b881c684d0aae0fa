"""A ComfyUI MODEL, read once: its network, student card and fingerprint."""

import dataclasses
from dataclasses import dataclass
from functools import cached_property

import comfy.model_management as mm
import comfy.model_sampling
from comfy.quant_ops import QuantizedTensor
from comfy_api.latest import io
from torch import nn

from ..model.config import StudentCard
from ..model.fingerprint import COMPILED, fingerprint
from ..model.network import Network
from ..model.text_cache import TextCache
from ..model.units import LATENT_CHANNELS
from .patches import runner_of
from .shared import log

CARD = "context_forcing_card"
"""Name of the attachment of a MODEL that holds its StudentCard."""
COMMIT = "context_forcing_commit"
"""Name of the additional model of a MODEL that computes the commit pass."""
TEXT_TO_VIDEO = ("WAN21", "WAN21_CausalAR")
"""ComfyUI's classes of Wan 2.1 text-to-video. Related models have other classes and additional layers."""


@dataclass(frozen=True)
class StudentModel:
    """A MODEL that holds a Wan 2.1 text-to-video student."""

    model: io.Model.Type
    net: nn.Module
    card: StudentCard

    @classmethod
    def of(cls, model: io.Model.Type) -> "StudentModel":
        """Read a MODEL; one without a card gets the default card. Raises ValueError if it is another kind of model."""
        net, card = wan_network(model), model.get_attachment(CARD)
        if card is None:
            card = StudentCard()
            steps = ", ".join(f"{step:g}" for step in card.steps)
            log.warning(
                f"model: no student card; steps {steps}, shift {card.shift:g} and chunk {card.memory.chunk} of"
                " Self-Forcing are used, Student Settings changes them"
            )
        sampling = model.object_patches.get("model_sampling")
        if isinstance(sampling, comfy.model_sampling.ModelSamplingDiscreteFlow) and sampling.shift != card.shift:
            log.warning("model: shift %g of its ModelSampling node replaces the card's %g", sampling.shift, card.shift)
            card = dataclasses.replace(card, shift=float(sampling.shift))
        return cls(model, net, card)

    @cached_property
    def network(self) -> Network:
        """The network with the dtype of its activations, whatever dtype its weights are stored in."""
        dtype = self.model.get_model_object("manual_cast_dtype") or self.model.model.get_dtype()
        on_pass = mm.throw_exception_if_processing_interrupted
        # A node reads its MODEL anew, so the texts are of one node and one set of LoRAs.
        network = Network(
            self.net, self.model.load_device, dtype, run=runner_of(self.model), on_pass=on_pass, texts=TextCache()
        )
        commit = [dataclasses.replace(network, net=wan_network(model), texts=TextCache()) for model in self.commit]
        return dataclasses.replace(network, commit=commit[0]) if commit else network

    @property
    def commit(self) -> list[io.Model.Type]:
        """The MODEL of the commit pass, if the student has weights of its own for it."""
        return self.model.get_additional_models_with_key(COMMIT)

    @cached_property
    def fingerprint(self) -> str:
        """Fingerprint of the weights without LoRAs: a memory may be continued with another LoRA.

        ComfyUI either merges LoRAs and keeps the original weights in `backup`, or applies them during the pass. The
        stored numbers of quantised weights count: they have the signs of the real ones.
        """
        backups = {name.removeprefix("diffusion_model."): backup.weight for name, backup in self.model.backup.items()}
        stored = {
            name.replace(COMPILED, ""): weight for name, weight in [*self.net.named_parameters(), *backups.items()]
        }
        numbers = {name: w._qdata if isinstance(w, QuantizedTensor) else w for name, w in stored.items()}
        return fingerprint(self.net, numbers, wan_network(self.commit[0]) if self.commit else None)


def wan_network(model: io.Model.Type) -> nn.Module:
    """The network in a MODEL. Raises ValueError, with the model's class, unless it is Wan 2.1 text-to-video."""
    net, name = model.model.diffusion_model, type(model.model).__name__
    remedy = "load a Wan 2.1 text-to-video student, for example with Load Student"
    if name not in TEXT_TO_VIDEO:
        raise ValueError(f"model: {name} is not Wan 2.1 text-to-video; {remedy}")
    channels, image_embeddings = net.patch_embedding.in_channels, net.img_emb is not None
    if channels != LATENT_CHANNELS or image_embeddings:
        also = " and image embeddings" if image_embeddings else ""
        raise ValueError(
            f"model: {name} with {channels} input channels{also} is not text-to-video ({LATENT_CHANNELS}); {remedy}"
        )
    return net
