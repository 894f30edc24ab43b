"""Export: one file for another program, read back by that program's rules before it gets its name."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import nn

from qrlora._files import write_atomically
from qrlora._said import said
from qrlora.errors import MismatchError
from qrlora.method.adapter import Adapter, save_adapter
from qrlora.method.adapter.attach import check_fits
from qrlora.method.adapter.container import check_finite
from qrlora.method.basis import Basis
from qrlora.models.exchange.forms import FAMILIES_OF, is_adapter_file, tensors_of
from qrlora.models.exchange.layer_names import LayerNames
from qrlora.models.exchange.names import flattened, kohya_names
from qrlora.models.exchange.notes import notes_for
from qrlora.models.exchange.verification import check_same
from qrlora.models.families import ModelFamily


@dataclass(frozen=True)
class Export:
    """Result of an export: layers in the file, and how many of them each program matches (all, or it is an error)."""

    layers: int
    matched: dict[str, int]


def export_adapter(
    adapter: Adapter,
    path: str | Path,
    target: str,
    pipe: Any,
    family: ModelFamily,
    *,
    basis: Basis | None = None,
    dtype: torch.dtype | None = None,
) -> Export:
    """Write `adapter` in the form `target` (see forms.py), alpha folded in; nothing is left if it would not load.

    Args:
        pipe, family: the base model; its layers are what the keys have to match.
        basis: of an adapter that stands on one.
        dtype: of the tensors; the adapter's own unless given.

    Raises:
        MismatchError: another family, another base model, or layers that have no name in this form.
        AdapterFileError: the file would not load as it should; the error lists every such key and layer.
    """
    path, denoiser = Path(path), family.denoiser_of(pipe)
    meta = adapter.metadata
    _check_family(adapter, family, target)
    check_fits(denoiser, adapter)
    if dtype is not None:
        adapter = _as_dtype(adapter, dtype)
    notes = notes_for(adapter, meta.family or family.name, path.stem, family.resolution(pipe))
    matched: dict[str, int] = {}

    def check(written: Path) -> None:
        # diffusers reads every form, so a UNet's kohya file has to pass both sets of rules
        rules = ("diffusers", "kohya") if target == "kohya" and family.denoiser == "unet" else ("diffusers",)
        matched.update({rule: check_same(written, rule, family, denoiser, adapter, basis) for rule in rules})

    _write(adapter, path, target, family, denoiser, basis, notes, check)
    return Export(len(adapter.deltas), matched)


def _check_family(adapter: Adapter, family: ModelFamily, target: str) -> None:
    known = adapter.metadata.family
    if known and known != family.name:
        raise MismatchError("adapter of another family than this model", expected=known, got=family.name)
    if target in FAMILIES_OF and family.name not in FAMILIES_OF[target]:
        raise MismatchError(
            said("no %(target)s form for %(name)s", target=target, name=family.name),
            expected=", ".join(FAMILIES_OF[target]),
            got=family.name,
            remedy="export it in the diffusers form (--for diffusers), which its programs read",
        )


def _write(
    adapter: Adapter,
    path: Path,
    target: str,
    family: ModelFamily,
    denoiser: nn.Module,
    basis: Basis | None,
    notes: dict[str, str],
    check: Callable[[Path], None],
) -> None:
    """Write the file, as an adapter file of ours wherever the form can record which layer is called what."""
    if is_adapter_file(target, family.name):
        names = _names(adapter, family, denoiser) if target == "kohya" else None
        spelling = "lora" if target == "diffusers" else "kohya"
        save_adapter(adapter, path, spelling, basis, names=names, notes=notes, check=check)
        return
    tensors = tensors_of(adapter, target, family.name, LayerNames(family, denoiser).modules, basis)
    check_finite(tensors)
    write_atomically(path, safetensors.torch.save(tensors, metadata=notes), check=check)


def _as_dtype(adapter: Adapter, dtype: torch.dtype) -> Adapter:
    # The scaling goes in first: folded afterwards it would be rounded twice.
    deltas = {name: (adapter.scaling * delta.float()).to(dtype) for name, delta in adapter.deltas.items()}
    metadata = dataclasses.replace(adapter.metadata, alpha=float(adapter.metadata.rank))
    ups = None if adapter.ups is None else {name: up.to(dtype) for name, up in adapter.ups.items()}
    return dataclasses.replace(adapter, metadata=metadata, deltas=deltas, ups=ups)


def _names(adapter: Adapter, family: ModelFamily, unet: nn.Module) -> dict[str, str]:
    if family.name != "sdxl":
        return {name: flattened(name) for name in adapter.deltas}
    layers = getattr(unet, "config", {}).get("layers_per_block")
    if not isinstance(layers, int):
        raise MismatchError(
            "a UNet whose blocks differ in their number of layers has no kohya form",
            expected="one number of layers per block",
            got=layers,
            remedy="export it for diffusers",
        )
    return kohya_names(adapter.deltas, [name for name, _ in unet.named_modules()], layers)
