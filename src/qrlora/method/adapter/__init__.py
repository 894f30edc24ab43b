"""Adapters: all ΔR of one training run with their metadata, their files, and their way into and out of a model.

record.py   Adapter, AdapterMetadata: the thing itself, validated
file.py     save_adapter, load_adapter: safetensors in two spellings, a strict reader, an atomic writer
model.py    adapter_from_model, attach, basis_of, remove_adapters: between an Adapter and the PEFT layers of a denoiser
"""

from __future__ import annotations

from qrlora.method.adapter.attach import adapter_from_model, attach, basis_of, remove_adapters
from qrlora.method.adapter.file import load_adapter, save_adapter
from qrlora.method.adapter.record import Adapter, AdapterMetadata, ParameterCount

__all__ = [
    "Adapter",
    "AdapterMetadata",
    "ParameterCount",
    "adapter_from_model",
    "attach",
    "basis_of",
    "load_adapter",
    "remove_adapters",
    "save_adapter",
]
