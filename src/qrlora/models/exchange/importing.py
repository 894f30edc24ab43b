"""Import another program's file as an adapter, with a basis of its own or projected onto ours."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qrlora.method.adapter import Adapter
from qrlora.method.adapter.attach import base_weights, check_fits
from qrlora.method.basis import Basis
from qrlora.models.exchange.layer_names import LayerNames
from qrlora.models.exchange.lora_files import load_any
from qrlora.models.exchange.projection import EnergyKept, project
from qrlora.models.exchange.published import (
    Published,
    as_difference,
    is_published,
    is_whole,
    load_published,
    may_be_whole,
    on_basis,
)
from qrlora.models.exchange.tensors import read_shapes, read_tensor_file
from qrlora.models.families import ModelFamily


@dataclass(frozen=True)
class Onto:
    """The basis to project onto, and which of its columns (all unless given)."""

    rank: int
    columns: Sequence[int] | None = None
    algorithm: str = "fast"
    seed: int = 0
    triangular: bool = False

    @classmethod
    def like(cls, adapter: Adapter) -> Onto:
        """Return basis and columns of `adapter`, so that the imported adapter composes with it."""
        meta = adapter.metadata
        return cls(meta.basis_rank, meta.columns, meta.algorithm, meta.basis_seed)


def import_file(
    path: str | Path,
    *,
    pipe: Any = None,
    family: ModelFamily | None = None,
    onto: Onto | None = None,
    alpha: float | None = None,
    **metadata: str,
) -> tuple[Adapter, EnergyKept | None]:
    """The file as an adapter, and what a projection kept of it (None if nothing was projected: ΔW is the file's).

    Args:
        pipe, family: the base model, which `onto` needs; with it every layer's name and shape is checked, and a
            published checkpoint comes out as ΔR on its basis, exactly, rather than as the LoRA that it equals. A
            published checkpoint that holds trained Q and R requires them.
        onto: project the ΔW onto this basis.
        alpha: as `load_any`.
        metadata: fields of AdapterMetadata that the file cannot know: base_model, role, trigger, licence.

    Raises:
        AdapterFileError, MismatchError: as `load_any`, `on_basis`, `as_difference` and `project`.
    """
    if pipe is None or family is None:
        adapter = load_any(path, alpha=alpha)
        return _with(adapter, metadata), None
    denoiser = family.denoiser_of(pipe)
    described = {"family": family.name, "denoiser": family.denoiser, **metadata}
    adapter = _read(Path(path), family, denoiser, alpha, exactly=onto is None)
    check_fits(denoiser, adapter)
    adapter = _with(adapter, described)
    if onto is None:
        return adapter, None
    weights = base_weights(denoiser, adapter.deltas)
    basis = Basis.of(weights, onto.rank, algorithm=onto.algorithm, seed=onto.seed)
    return project(adapter, basis, onto.columns, triangular=onto.triangular, own_basis=_own_basis(adapter, weights))


def _read(path: Path, family: ModelFamily, denoiser: Any, alpha: float | None, exactly: bool) -> Adapter:
    """The file's ΔW; exactly: a published checkpoint as ΔR on its own basis rather than as a LoRA."""
    keys, _ = read_shapes(path)
    if may_be_whole(keys) or (exactly and is_published(keys)):
        tensors, _ = read_tensor_file(path)
        if is_whole(tensors) or (exactly and is_published(keys)):
            return _from_published(load_published(path, tensors), denoiser, alpha)
    return load_any(path, alpha=alpha, names=LayerNames(family, denoiser))


def _from_published(published: Published, denoiser: Any, alpha: float | None) -> Adapter:
    weights = base_weights(denoiser, published.layers)
    basis = Basis.of(weights, published.rank, algorithm="exact")  # the published code's own decomposition
    return as_difference(published, basis, alpha) if published.whole else on_basis(published, weights, basis, alpha)


def _own_basis(adapter: Adapter, weights: dict[str, Any]) -> Basis | None:
    meta = adapter.metadata
    if not meta.on_basis:
        return None
    return Basis.of(weights, meta.basis_rank, algorithm=meta.algorithm, seed=meta.basis_seed)


def _with(adapter: Adapter, metadata: dict[str, str]) -> Adapter:
    """Return the adapter with those of these fields that are given."""
    fields: dict[str, Any] = {name: value for name, value in metadata.items() if value}
    return dataclasses.replace(adapter, metadata=dataclasses.replace(adapter.metadata, **fields))
