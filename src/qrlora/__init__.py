"""QR-LoRA (arXiv 2507.04599): learn a subject and a style from one picture each, and put them together.

    from qrlora import QRLoraConfig
    pipe.transformer.add_adapter(QRLoraConfig(r=16, columns="subject", target_modules=["to_q", "to_k", "to_v"]))

Names are loaded when they are first used, so that the command line's help does not wait for torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_HOMES = {
    "errors": ("QrloraError",),
    "basis": ("Basis", "LayerBasis", "layer_basis"),
    "tuner": ("QRLoraConfig", "QRLoraModel"),
    "adapter": ("Adapter", "AdapterMetadata", "adapter_from_model", "attach", "load_adapter", "save_adapter"),
    "composition": ("Composition", "Live", "compose_delta_weights", "similarity"),
    "families": ("FAMILIES", "load_pipeline"),
    "exchange": ("export_adapter", "extract_lora", "import_file", "load_any", "project"),
    "training.recipe": ("Recipe",),
    "training.loop": ("train",),
    "generation": ("Request", "generate", "generate_mixed"),
}
_HOME_OF = {name: f"qrlora.{home}" for home, names in _HOMES.items() for name in names}

__all__ = [
    "FAMILIES",
    "Adapter",
    "AdapterMetadata",
    "Basis",
    "Composition",
    "LayerBasis",
    "Live",
    "QRLoraConfig",
    "QRLoraModel",
    "QrloraError",
    "Recipe",
    "Request",
    "__version__",
    "adapter_from_model",
    "attach",
    "compose_delta_weights",
    "export_adapter",
    "extract_lora",
    "generate",
    "generate_mixed",
    "import_file",
    "layer_basis",
    "load_adapter",
    "load_any",
    "load_pipeline",
    "project",
    "save_adapter",
    "similarity",
    "train",
]

if TYPE_CHECKING:
    from qrlora.adapter import Adapter, AdapterMetadata, adapter_from_model, attach, load_adapter, save_adapter
    from qrlora.basis import Basis, LayerBasis, layer_basis
    from qrlora.composition import Composition, Live, compose_delta_weights, similarity
    from qrlora.errors import QrloraError
    from qrlora.exchange import export_adapter, extract_lora, import_file, load_any, project
    from qrlora.families import FAMILIES, load_pipeline
    from qrlora.generation import Request, generate, generate_mixed
    from qrlora.training.loop import train
    from qrlora.training.recipe import Recipe
    from qrlora.tuner import QRLoraConfig, QRLoraModel


def __getattr__(name: str) -> Any:
    if name in _HOME_OF:
        return getattr(import_module(_HOME_OF[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
