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
    "method.basis": ("Basis", "LayerBasis", "layer_basis"),
    "method.tuner": ("QRLoraConfig", "QRLoraModel"),
    "method.adapter": (
        *("Adapter", "AdapterMetadata", "adapter_from_model", "attach", "basis_of", "load_adapter", "save_adapter"),
    ),
    "method.composition": ("Composition", "Live", "compose_delta_weights", "similarity"),
    "models.families": ("FAMILIES", "load_pipeline"),
    "models.exchange": ("export_adapter", "extract_lora", "import_file", "load_any", "project"),
    "models.training.recipe": ("Recipe",),
    "models.training.loop": ("train",),
    "models.generation": ("Request", "generate", "generate_mixed", "weight_grid"),
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
    "basis_of",
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
    "weight_grid",
]

if TYPE_CHECKING:
    from qrlora.errors import QrloraError
    from qrlora.method.adapter import Adapter, AdapterMetadata, load_adapter, save_adapter
    from qrlora.method.adapter.attach import adapter_from_model, attach, basis_of
    from qrlora.method.basis import Basis, LayerBasis, layer_basis
    from qrlora.method.composition import Composition, Live, compose_delta_weights, similarity
    from qrlora.method.tuner import QRLoraConfig, QRLoraModel
    from qrlora.models.exchange import export_adapter, extract_lora, import_file, load_any, project
    from qrlora.models.families import FAMILIES, load_pipeline
    from qrlora.models.generation import Request, generate, generate_mixed, weight_grid
    from qrlora.models.training.loop import train
    from qrlora.models.training.recipe import Recipe


def __getattr__(name: str) -> Any:
    if name in _HOME_OF:
        return getattr(import_module(_HOME_OF[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
