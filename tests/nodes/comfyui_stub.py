"""Stand-ins for ComfyUI's modules, so that nodes/ can be imported and its logic tested without ComfyUI."""

import importlib.abc
import importlib.machinery
import sys
import types
from unittest.mock import MagicMock

PACKAGES = ("comfy", "comfy_api", "comfy_execution", "folder_paths", "latent_preview", "aiohttp", "server")


class StubModule(types.ModuleType):
    """A module or package of ComfyUI. Every attribute exists."""

    __path__ = []

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        value = MagicMock(name=name)
        setattr(self, name, value)
        return value


class StubFinder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def __init__(self):
        self.imported = []
        """Names of the stub modules, in the order of their first import."""

    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in PACKAGES:
            return importlib.machinery.ModuleSpec(name, self, is_package=True)

    def create_module(self, spec):
        return StubModule(spec.name)

    def exec_module(self, module):
        self.imported.append(module.__name__)


class InputType:
    """A type of ComfyUI's io: inputs and outputs keep their arguments."""

    Type = object

    @staticmethod
    def Input(name, **options):
        return types.SimpleNamespace(id=name, **options)

    Output = Input


def install() -> StubFinder:
    """From now on ComfyUI's modules are stubs. The types that nodes inherit from and compare with are classes."""
    finder = StubFinder()
    sys.meta_path.insert(0, finder)
    return finder


def define_types() -> None:
    import comfy.ldm.wan.vae
    import comfy.model_sampling
    import comfy.quant_ops
    import comfy.sd
    import comfy.taesd.taehv
    import comfy_api.latest as api

    api.ComfyExtension = type("ComfyExtension", (), {})
    names = "Model Clip Vae Conditioning Latent Image Video ClipVision Int Float String Boolean Combo".split()
    api.io = types.SimpleNamespace(
        ComfyNode=type("ComfyNode", (), {}), Schema=lambda **fields: types.SimpleNamespace(**fields),
        NodeOutput=lambda *result, **options: types.SimpleNamespace(result=result, **options), Hidden=MagicMock(),
        ControlAfterGenerate=MagicMock(), FolderType=MagicMock(), Custom=lambda name: InputType, Input=object,
        **dict.fromkeys(names, InputType),
    )  # fmt: skip
    comfy.sd.VAE = type("VAE", (), {})
    comfy.taesd.taehv.TAEHV = type("TAEHV", (), {})
    comfy.model_sampling.ModelSamplingDiscreteFlow = type("ModelSamplingDiscreteFlow", (), {})
    comfy.quant_ops.QuantizedTensor = type("QuantizedTensor", (), {})
