"""The adapter: ΔR of every layer, the basis it was trained on, and its origin."""

from __future__ import annotations

import functools
import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from qrlora._said import said
from qrlora.errors import AdapterFileError, MismatchError, bounded
from qrlora.method.basis import TURNED, VERSIONS, Basis, clipped_rank, fingerprint, sketch, turned, version_of

FORMAT_VERSION = 1
METHODS = ("qrlora", "qrlora_train_basis", "lora")
LARGEST = torch.finfo(torch.float32).max
ROLES = ("", "subject", "style", "composition")


def require(ok: bool, what: str, *, expected: object = None, got: object = None, remedy: str | None = None) -> None:
    """Raise AdapterFileError with the given parts unless `ok`."""
    if not ok:
        raise AdapterFileError(what, expected=expected, got=got, remedy=remedy)


@dataclass(frozen=True)
class AdapterMetadata:
    """Metadata of an adapter, written into its file, one string per field.

    method            "qrlora" (ΔR on a basis), "qrlora_train_basis" (Q and R both trained: a rank-2r LoRA) or "lora"
    rank, alpha       rows of each ΔR; the scaling is s = alpha / rank, in every layer
    basis_rank        columns of the whole basis, of which `columns` (increasing, from 0) are this adapter's; a layer
                      whose smaller side is k has those below k alone (`columns_in`), and as many rows of ΔR
    triangular        ΔR is upper triangular in basis coordinates: the row of column c is zero before entry c
    algorithm, basis_seed, basis_fingerprint    which basis (see qrlora.method.basis)
    family, denoiser  row of the family table; the pipeline's attribute that is adapted ("transformer" or "unet")
    base_model, base_digest    id or path of the base model, and a digest of it where the caller knows one
    role, trigger, licence     "subject", "style", "composition" or ""; the word that calls it; its licence
    recipe, provenance         JSON objects: how it was trained; what it was made from

    Raises AdapterFileError if the fields contradict each other.
    """

    method: str
    rank: int
    alpha: float
    basis_rank: int = 0
    columns: tuple[int, ...] = ()
    triangular: bool = False
    algorithm: str = ""
    basis_seed: int = 0
    basis_fingerprint: str = ""
    family: str = ""
    denoiser: str = "transformer"
    base_model: str = ""
    base_digest: str = ""
    role: str = ""
    trigger: str = ""
    licence: str = ""
    recipe: Mapping[str, Any] = field(default_factory=dict)
    provenance: Mapping[str, Any] = field(default_factory=dict)
    format_version: int = FORMAT_VERSION

    def __post_init__(self) -> None:
        require(
            self.format_version == FORMAT_VERSION,
            "adapter of another format version",
            expected=FORMAT_VERSION,
            got=self.format_version,
            remedy="upgrade qrlora, or export the adapter again with this version",
        )
        require(self.method in METHODS, "unknown method", expected=" or ".join(METHODS), got=self.method)
        require(self.role in ROLES, "unknown role", expected=" or ".join(map(repr, ROLES)), got=repr(self.role))
        require(self.rank >= 1, "rank below one", expected="a positive integer", got=self.rank)
        require(math.isfinite(self.alpha), "alpha is not a number", expected="a finite number", got=self.alpha)
        if self.on_basis:
            self._check_columns()

    def _check_columns(self) -> None:
        columns = self.columns
        require(len(columns) == self.rank, "rank and columns disagree", expected=self.rank, got=len(columns))
        inside = all(0 <= c < self.basis_rank for c in columns)
        require(
            inside and list(columns) == sorted(set(columns)),
            "columns are not a set of the basis's columns",
            expected=f"increasing numbers from 0 to {self.basis_rank - 1}",
            got=list(columns),
        )

    @property
    def on_basis(self) -> bool:
        """Return True if the adapter is ΔR alone and its Q is found by fingerprint; False if it has own up matrices."""
        return self.method == "qrlora"

    def columns_in(self, shape: Sequence[int]) -> tuple[int, ...]:
        """Return the columns that a layer of this shape has."""
        held = clipped_rank(shape, self.basis_rank)
        return tuple(column for column in self.columns if column < held)

    def rank_in(self, shape: Sequence[int]) -> int:
        """Return the rows of ΔR, or of down, in a layer; an adapter with its own ups has one rank everywhere."""
        return len(self.columns_in(shape)) if self.on_basis else self.rank

    @property
    def scaling(self) -> float:
        """s = alpha / rank: ΔW = s · Q ΔR."""
        return self.alpha / self.rank

    @property
    def null_space(self) -> float:
        """Strength of the null-space projection that a composition was made with; older files call it `giving_way`."""
        return float(self.provenance.get("null_space", self.provenance.get("giving_way", 0.0)))

    @property
    def recipe_digest(self) -> str:
        """SHA-256 of the recipe as canonical JSON."""
        return hashlib.sha256(json.dumps(self.recipe, sort_keys=True, allow_nan=False).encode()).hexdigest()


@dataclass(frozen=True)
class ParameterCount:
    """Trained numbers of an adapter, those of a LoRA of the same rank on the same layers, and their ratio."""

    trained: int
    lora_same_rank: int

    @property
    def ratio(self) -> float:
        """Trained parameters as a share of LoRA's."""
        return self.trained / self.lora_same_rank


def triangular_mask(columns: tuple[int, ...], width: int) -> Bool[Tensor, "rank in"]:
    """Return where a triangular ΔR may be non-zero: j >= columns[i], so that the whole basis's R stays a triangle."""
    return torch.arange(width)[None, :] >= torch.tensor(columns)[:, None]


@dataclass(frozen=True, eq=False)
class Adapter:
    """All ΔR of one training run: ΔW = s · Q[:, columns] · ΔR per layer (arXiv 2507.04599: R + ΔR trains, Q is frozen).

    deltas   layer name -> ΔR, (rank, in), float32/16 or bfloat16; a convolution's input is flattened to in·kh·kw;
             fewer rows in a layer that has fewer of the columns (`columns`)
    shapes   layer name -> shape of the base weight: (out, in) or (out, in, *kernel)
    digests  layer name -> digest of the base weight the basis was made of; empty for plain LoRA
    ups      layer name -> (out, rank) if the adapter carries its own left factor (plain LoRA, train_basis); else None
    name     what to call it in tables: the file's stem when loaded
    sketches layer name -> sketch of the Q it was trained on (see qrlora.method.basis); older files have none

    Raises AdapterFileError if the parts do not fit the metadata.
    """

    metadata: AdapterMetadata
    deltas: Mapping[str, Tensor]
    shapes: Mapping[str, tuple[int, ...]]
    digests: Mapping[str, str] = field(default_factory=dict)
    ups: Mapping[str, Tensor] | None = None
    name: str = ""
    sketches: Mapping[str, tuple[float, ...]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        require(len(self.deltas) > 0, "adapter without layers", expected="at least one layer", got="none")
        _same_layers("shapes", self.deltas, self.shapes)
        if self.metadata.on_basis:
            require(self.ups is None, "a qrlora adapter has no ups of its own", expected="ups=None", got="ups")
            _same_layers("digests", self.deltas, self.digests)
        else:
            require(self.ups is not None, f"a {self.metadata.method} adapter has its own ups", got="ups=None")
            _same_layers("ups", self.deltas, self.ups or {})
        for layer in self.deltas:
            self._check_layer(layer)

    def _check_layer(self, layer: str) -> None:
        meta, shape = self.metadata, self.shapes[layer]
        require(2 <= len(shape) <= 5, f"{layer}: no matrix or convolution", expected="2 to 5 sizes", got=shape)
        out, width = shape[0], math.prod(shape[1:])
        rank = meta.rank_in(shape)
        require(rank > 0, f"{layer}: has no column of the adapter's", expected=f"columns of {shape}", got=meta.columns)
        require(
            tuple(self.deltas[layer].shape) == (rank, width),
            f"{layer}: ΔR has another shape than rank and base weight say",
            expected=(rank, width),
            got=tuple(self.deltas[layer].shape),
        )
        if self.ups is not None:
            got = tuple(self.ups[layer].shape)
            require(got == (out, meta.rank), f"{layer}: up has the wrong shape", expected=(out, meta.rank), got=got)
            return
        if meta.triangular:
            columns = self.columns(layer)
            corner = self.deltas[layer].detach()[:, : columns[-1]].cpu()  # what lies right of it is in the triangle
            require(
                not bool(corner[~triangular_mask(columns, columns[-1])].any()),
                f"{layer}: ΔR is called triangular, but has entries below the diagonal",
                remedy="set triangular=False, or zero them: ΔR[i, :columns[i]] = 0",
            )

    def columns(self, layer: str) -> tuple[int, ...]:
        """Return the basis columns that the rows of a layer's ΔR belong to."""
        return self.metadata.columns_in(self.shapes[layer])

    @property
    def scaling(self) -> float:
        """s = alpha / rank."""
        return self.metadata.scaling

    @property
    def digest(self) -> str:
        """SHA-256 of what the adapter does (s · ΔR, ups, columns, basis), the same in both spellings of the file."""
        meta = self.metadata
        whole = hashlib.sha256(json.dumps([meta.columns, meta.basis_fingerprint]).encode())
        for layer in sorted(self.deltas):
            down = self.deltas[layer].detach().float().cpu() * self.scaling + 0.0  # -0.0 becomes 0.0
            whole.update(json.dumps([layer, self.shapes[layer]]).encode())
            whole.update(down.contiguous().numpy().tobytes())
            if self.ups is not None:
                whole.update(self.ups[layer].detach().float().cpu().contiguous().numpy().tobytes())
        return whole.hexdigest()

    @functools.cached_property
    def strength(self) -> float:
        """Estimate the largest number computed by the adapter at weight 1 for an input of norm 1: the largest row norm
        of s · ΔR, times that of its own ups. Null-space projection lengthens no row, so it holds after it too."""
        lengths = {layer: _longest_row(delta) for layer, delta in self.deltas.items()}
        if self.ups is not None:
            lengths = {layer: length * _longest_row(self.ups[layer]) for layer, length in lengths.items()}
        # Multiplied one by one, because max() passes over NaN.
        return max((abs(self.scaling) * length for length in lengths.values()), key=lambda x: (x != x, x))

    def check_strength(self, weight: float = 1.0, largest: float = LARGEST) -> None:
        """Raise MismatchError if `strength` times this weight exceeds `largest`, the limit of the dtype in use."""
        if not abs(weight) * self.strength <= largest:  # NaN is not, nor is 0 times infinity
            raise MismatchError(
                said(
                    "%(name)s is not finite at weight %(weight)s: its pictures would be black",
                    name=self.name or said("the adapter"),
                    weight=f"{weight:g}",
                ),
                expected=said(
                    "a weight, times alpha / rank, times the longest row of ΔR, of at most %(largest)s",
                    largest=f"{largest:.3g}",
                ),
                got=said(
                    "%(weight)s; alpha %(alpha)s, rank %(rank)s",
                    weight=f"{abs(weight) * self.strength:.3g}",
                    alpha=f"{self.metadata.alpha:g}",
                    rank=self.metadata.rank,
                ),
                remedy="lower the weight; if it is 1 already, leave this file out: its alpha or its numbers are wrong",
            )

    def parameters(self) -> ParameterCount:
        """Count the trained numbers: r·in per layer, less the zeros of the triangle; with r·out where Q trains too.

        LoRA of the same rank trains r·(out + in), in small layers too. A composition trains nothing: there `trained`
        counts what is kept.
        """
        meta = self.metadata
        # An exported train_basis adapter has rank 2r: the trained pair, and the frozen pair it replaces.
        rank = meta.rank // 2 if meta.method == "qrlora_train_basis" else meta.rank
        trained = lora = 0
        for shape in self.shapes.values():
            out, width = shape[0], math.prod(shape[1:])
            # Neither plain LoRA nor an older train_basis file says columns: it has the first ones, all of them.
            columns = meta.columns_in(shape) if meta.columns else tuple(range(rank))
            trained += sum(width - c for c in columns) if meta.triangular else len(columns) * width
            trained += 0 if meta.on_basis else len(columns) * out
            lora += rank * (out + width)
        return ParameterCount(trained, lora)

    def up(self, layer: str, q: Float[Tensor, "out basis_rank"] | None = None) -> Float[Tensor, "out rank"]:
        """The left factor of ΔW: its own up, or its columns of the layer's Q; MismatchError if that Q does not fit."""
        if self.ups is not None:
            return self.ups[layer]
        shape = self.shapes[layer]
        expected = (shape[0], clipped_rank(shape, self.metadata.basis_rank))
        if q is None or tuple(q.shape) != expected:
            got = "no Q" if q is None else tuple(q.shape)
            raise MismatchError(f"{layer}: ΔR needs the Q of its whole basis", expected=expected, got=got)
        return q[:, list(self.columns(layer))]

    def delta_weight(self, layer: str, q: Float[Tensor, "out basis_rank"] | None = None) -> Float[Tensor, "out in"]:
        """Return s · Q[:, columns] · ΔR in float32; a convolution's stays flattened (reshape to `shapes[layer]`)."""
        return self.scaling * self.up(layer, q).float() @ self.deltas[layer].float()

    @property
    def basis_version(self) -> int | None:
        """Return the version of the algorithm that made its basis; None if its fingerprint is of no known one."""
        meta = self.metadata
        return version_of(meta.basis_fingerprint, self.digests, meta.basis_rank, meta.algorithm, meta.basis_seed)

    def check_version(self) -> None:
        """Raise MismatchError if its basis was made by an algorithm that this package does not have: it would make
        another Q."""
        meta, found = self.metadata, self.basis_version
        ours = VERSIONS.get(meta.algorithm)
        if found is None or found != ours:
            raise MismatchError(
                f"{self.name or 'the adapter'} stands on a basis that this version does not make",
                expected=f"{fingerprint(self.digests, meta.basis_rank, meta.algorithm, meta.basis_seed)} "
                f"(algorithm {meta.algorithm!r}, version {ours})",
                got=f"{meta.basis_fingerprint} (version {found or 'unknown'})",
                remedy="its ΔR means nothing on another Q: train it again, or export it as a LoRA with the version of "
                "qrlora that trained it",
            )

    def check_sketches(self, found: Mapping[str, Sequence[float]]) -> None:
        """Raise MismatchError if a Q, given by its sketch, is not the one that ΔR was trained on, to ``TURNED``.

        The same weight gives another Q where nearly equal singular values lie on both sides of the rank and other
        hardware rounds otherwise, and where the cache was tampered with. Layers without a sketch are not compared.
        """
        both = {name: turned(self.sketches[name], found[name]) for name in self.sketches if name in found}
        far = {name: round(angle, 3) for name, angle in both.items() if not angle <= TURNED}
        if far:
            raise MismatchError(
                f"{self.name or 'the adapter'}: {len(far)} of {len(both)} layers have another Q than it was trained on",
                expected=f"columns within {TURNED} of the trained ones, as root mean square",
                got=far,
                remedy="export it as a LoRA, which carries its Q, where it was trained; if the basis cache came from "
                "elsewhere, delete it",
            )

    def check_basis(self, basis: Basis) -> None:
        """Raise MismatchError unless `basis` holds the very Q this adapter was trained on, for each of its layers."""
        self.check_version()
        meta = self.metadata
        expected = {"rank": meta.basis_rank, "algorithm": meta.algorithm, "seed": meta.basis_seed}
        got = {"rank": basis.rank, "algorithm": basis.algorithm, "seed": basis.seed}
        if expected != got:
            raise MismatchError("adapter and basis differ", expected=expected, got=got, remedy="build the basis so")
        differ = {name: digest for name, digest in self.digests.items() if basis.digests.get(name) != digest}
        if differ:
            raise MismatchError(
                f"{len(differ)} of {len(self.digests)} layers stand on another base weight",
                expected=differ,
                got={name: basis.digests.get(name, "no such layer") for name in differ},
                remedy=f"use the base model it was trained on ({self.metadata.base_model or 'not recorded'})",
            )
        self.check_sketches({name: sketch(basis[name].q) for name in self.sketches})


def _longest_row(matrix: Float[Tensor, "rows width"]) -> float:
    """Return an upper bound of the rows' lengths, from the largest entry; NaN if there is one."""
    low, high = (float(value) for value in matrix.detach().aminmax())
    return max(-low, high) * math.sqrt(matrix.shape[1])


def _same_layers(what: str, deltas: Mapping[str, Any], others: Mapping[str, Any]) -> None:
    missing, unexpected = sorted(set(deltas) - set(others)), sorted(set(others) - set(deltas))
    require(
        not missing and not unexpected,
        f"{what} and ΔR name different layers",
        expected=f"the layers of ΔR; missing: {bounded(missing)}",
        got=f"unexpected: {bounded(unexpected)}",
    )
