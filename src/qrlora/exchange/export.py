"""Export: one file for another program, read back by that program's rules before it gets its name."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from qrlora.adapter import Adapter, save_adapter
from qrlora.adapter.model import check_fits
from qrlora.adapter.record import require
from qrlora.basis import Basis
from qrlora.errors import MismatchError
from qrlora.exchange.names import flattened, kohya_names
from qrlora.exchange.notes import notes_for
from qrlora.exchange.verification import TARGETS, count_matches
from qrlora.families import ModelFamily

KOHYA_FAMILIES = ("sd", "sdxl")
"""Families that ComfyUI, Forge and A1111 want in kohya's names; they read the others in the diffusers form."""


@dataclass(frozen=True)
class Export:
    """What was written: layers in the file, and how many of them each program will match (all, or it is an error)."""

    layers: int
    matched: dict[str, int]


def target_of(program: str, family: str) -> str:
    """The form that a program reads best: "comfyui", "forge" and "a1111" want kohya's names for the UNets."""
    if program in TARGETS:
        return program
    return "kohya" if family in KOHYA_FAMILIES else "diffusers"


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
    """Write `adapter` for `target` ("diffusers" or "kohya"), alpha folded in; nothing is left if it would not load.

    Args:
        pipe, family: the base model; its layers are what the keys have to match.
        basis: of an adapter that stands on one.
        dtype: of the tensors; the adapter's own unless given.

    Raises:
        MismatchError: another family, another base model, or layers that have no name in this form.
        AdapterFileError: the file would not load as it should; lists every key and layer that it is about.
    """
    path, denoiser = Path(path), family.denoiser_of(pipe)
    meta = adapter.metadata
    _check_family(adapter, family, target)
    check_fits(denoiser, adapter)
    if dtype is not None:
        adapter = _as_dtype(adapter, dtype)
    names = _names(adapter, family, denoiser) if target == "kohya" else None
    notes = notes_for(adapter, meta.family or family.name, path.stem, family.resolution(pipe))
    spelling = "lora" if target == "diffusers" else "kohya"
    matched: dict[str, int] = {}

    def check(written: Path) -> None:
        # diffusers reads both forms, so a kohya file has to pass both sets of rules
        targets = TARGETS if target == "kohya" else ("diffusers",)
        matched.update({name: count_matches(written, name, family, denoiser) for name in targets})
        short = {name: found for name, found in matched.items() if found != len(adapter.deltas)}
        require(not short, "layers would be left out", expected=len(adapter.deltas), got=short)

    save_adapter(adapter, path, spelling, basis, names=names, notes=notes, check=check)
    return Export(len(adapter.deltas), matched)


def _check_family(adapter: Adapter, family: ModelFamily, target: str) -> None:
    known = adapter.metadata.family
    if known and known != family.name:
        raise MismatchError("adapter of another family than this model", expected=known, got=family.name)
    if target == "kohya" and family.name not in KOHYA_FAMILIES:
        raise MismatchError(
            f"no kohya form for {family.name}",
            expected=", ".join(KOHYA_FAMILIES),
            got=family.name,
            remedy="export it for diffusers: ComfyUI, Forge and InvokeAI read that form for this family",
        )


def _as_dtype(adapter: Adapter, dtype: torch.dtype) -> Adapter:
    # The scaling goes in first: folded afterwards it would be rounded twice.
    deltas = {name: (adapter.scaling * delta.float()).to(dtype) for name, delta in adapter.deltas.items()}
    metadata = dataclasses.replace(adapter.metadata, alpha=float(adapter.metadata.rank))
    ups = None if adapter.ups is None else {name: up.to(dtype) for name, up in adapter.ups.items()}
    return dataclasses.replace(adapter, metadata=metadata, deltas=deltas, ups=ups)


def _names(adapter: Adapter, family: ModelFamily, unet: nn.Module) -> dict[str, str]:
    if family.name == "sd":
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
