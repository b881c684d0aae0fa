"""For scripts that ComfyUI's Python runs: our pack, loaded as ComfyUI does."""

import importlib
import importlib.util
import sys


def load_pack(checkout: str, pack: str):
    """As ComfyUI's `load_custom_node` does: by path, under any folder name. Returns (name of a part) -> module."""
    spec = importlib.util.spec_from_file_location(
        f"/somewhere/{pack}".replace(".", "_x_"), f"{checkout}/__init__.py", submodule_search_locations=[checkout]
    )
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return lambda name: importlib.import_module(f"{spec.name}.{name}")
