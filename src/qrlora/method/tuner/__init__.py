"""QR-LoRA as a PEFT method: importing this package makes PEFT and diffusers know ``QRLoraConfig``."""

from __future__ import annotations

from peft import PeftType
from peft.utils import register_peft_method
from peft.utils.hotswap import CONFIG_KEYS_TO_CHECK

from qrlora.method.tuner.config import NAMED_COLUMNS, QRLoraConfig, resolve_columns
from qrlora.method.tuner.layer import QRLoraLayer
from qrlora.method.tuner.model import QRLoraModel, adapter_fingerprint, basis_digests, basis_sketches

__all__ = [
    "NAMED_COLUMNS",
    "QRLoraConfig",
    "QRLoraLayer",
    "QRLoraModel",
    "adapter_fingerprint",
    "basis_digests",
    "basis_sketches",
    "resolve_columns",
]


def _register(name: str) -> None:
    """Make ``PeftType`` know a method of another package.

    PEFT registers methods by enum member and offers no way to add one, so the member is put where ``enum`` keeps them.
    A type of its own is what keeps stock PEFT from loading a file with ΔR alone as if it were a LoRA.
    """
    if name not in PeftType.__members__:
        member = str.__new__(PeftType, name)
        member._name_ = member._value_ = name
        type.__setattr__(PeftType, name, member)
        PeftType._member_map_[name] = PeftType._value2member_map_[name] = member
        PeftType._member_names_.append(name)
        register_peft_method(name=name.lower(), config_cls=QRLoraConfig, model_cls=QRLoraModel, prefix="lora_")
        # A hot swap replaces ΔR alone, so all that says which Q it belongs to has to agree.
        basis = ["r", "rank_pattern", "basis_rank", "columns", "algorithm", "basis_seed", "triangular", "train_basis"]
        CONFIG_KEYS_TO_CHECK[member] = ["use_rslora", "lora_dropout", "alpha_pattern", *basis]


_register("QRLORA")
