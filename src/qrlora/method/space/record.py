"""The space of adapters: mean and principal components of ΔR of one role on one basis, and where its members are.

On one frozen basis equal ΔW have equal ΔR, while a LoRA's B and A are fixed only up to an invertible matrix between
them. So sums, means and directions of ΔR are meaningful, and a new adapter can be trained as a few coefficients:
ΔR = m · mean + Σ zₖ cₖ. (Compare weights2weights, arXiv 2406.09413, and EigenLoRAx, arXiv 2502.04700, on LoRA's
factors.)
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from qrlora._said import Said, said, verbatim
from qrlora.errors import MismatchError
from qrlora.method.adapter.record import Adapter
from qrlora.method.space.principal import principal

LIKE = ("role", "method", "rank", "alpha", "columns", "triangular", "basis_rank", "algorithm", "basis_seed")
"""Fields of the metadata that all adapters of a space share."""

OF_ONE_SPACE = "a space takes adapters of one role, rank and columns, trained on one base model"


@dataclass(frozen=True)
class Projection:
    """Least-squares projection of an adapter: its coefficients, and the share of ‖ΔR‖² that they leave unexplained.

    mean          m, the coefficient of the mean
    coordinates   z, in standard deviations of the members
    nearest       name of a member -> cosine of both less the mean, as far as the components go; the nearest first
    """

    mean: float
    coordinates: tuple[float, ...]
    unexplained: float
    nearest: dict[str, float]


@dataclass(frozen=True, eq=False)
class Space:
    """A span of adapters of one role on one basis.

    mean          an adapter like the members: its metadata says role, basis, columns, base model and licence of all
    components    layer -> (k, rank, in), orthogonal over all layers, of unit variance, the largest first
    variances     of all components in ‖ΔR‖², also of those left out
    members       (name, digest) of the adapters it was built from
    coordinates   (n, k): the members' z

    Raises MismatchError if the parts do not fit each other.
    """

    mean: Adapter
    components: Mapping[str, Tensor]
    variances: tuple[float, ...]
    members: tuple[tuple[str, str], ...]
    coordinates: Float[Tensor, "n k"]

    def __post_init__(self) -> None:
        expected = {name: (self.count, *delta.shape) for name, delta in self.mean.deltas.items()}
        got = {name: tuple(part.shape) for name, part in self.components.items()}
        fits = got == expected and self.coordinates.shape == (len(self.members), self.count)
        numbers = all(math.isfinite(v) and v > 0 for v in self.variances)
        if not (fits and numbers and 1 <= self.count <= len(self.variances) < len(self.members)):
            raise MismatchError(
                "no space of adapters: its parts do not fit each other",
                expected=f"components {expected}, a variance for each, a member more than variances",
                got=f"components {got}, {len(self.variances)} variances, {len(self.members)} members, coordinates "
                f"{tuple(self.coordinates.shape)}",
            )

    @classmethod
    def of(cls, adapters: Sequence[Adapter], components: int | None = None) -> Space:
        """Return the space that adapters span; components: how many to keep (default: all, one less than adapters).

        Raises MismatchError for fewer than two adapters, the same one twice, more components than there are, and
        adapters that differ in basis, layers, columns, scaling or role; the error names both values.
        """
        most = len(adapters) - 1
        if most < 1 or not 1 <= (components or most) <= most:
            raise MismatchError(
                "a space has at most one component less than adapters",
                expected=said("two adapters or more, and from 1 to %(most)s components", most=max(1, most)),
                got=said(
                    "%(adapters)s adapters, %(components)s components",
                    adapters=len(adapters),
                    components=components or most,
                ),
                remedy="name more adapters, or fewer components",
            )
        for adapter in adapters:
            check_alike(adapters[0], adapter)
        digests = [adapter.digest for adapter in adapters]
        if len(set(digests)) < len(digests):
            twice = [a.name for a, digest in zip(adapters, digests, strict=True) if digests.count(digest) > 1]
            raise MismatchError(
                "the same adapter twice", expected="each once", got=twice, remedy="leave out all but one of them"
            )
        found = principal([adapter.deltas for adapter in adapters], components)
        members = tuple((a.name or digest[:12], digest) for a, digest in zip(adapters, digests, strict=True))
        mean = dataclasses.replace(_blank(adapters), deltas=found.mean)
        return cls(mean, found.components, found.variances, members, found.coordinates)

    @property
    def count(self) -> int:
        """Components kept."""
        return len(next(iter(self.components.values()), ()))

    @property
    def digest(self) -> str:
        """SHA-256 of the mean, the components and their basis."""
        whole = hashlib.sha256(self.mean.digest.encode())
        for layer in sorted(self.components):
            whole.update(json.dumps([layer, list(self.components[layer].shape)]).encode())
            whole.update(self.components[layer].contiguous().numpy().tobytes())
        return whole.hexdigest()

    @property
    def shares(self) -> tuple[float, ...]:
        """The share of the members' variance in each component, also in those left out."""
        return tuple(variance / sum(self.variances) for variance in self.variances)

    def adapter(self, coordinates: Sequence[float], mean: float = 1.0, name: str = "") -> Adapter:
        """Return the adapter at these coefficients: ΔR = mean · m + Σ zₖ cₖ, computed in float64."""
        if len(coordinates) > self.count:
            raise MismatchError("more coordinates than components", expected=self.count, got=len(coordinates))
        z = torch.tensor(list(coordinates), dtype=torch.float64)
        deltas = {
            layer: (mean * delta.double() + torch.tensordot(z, self.components[layer][: len(z)].double(), 1)).float()
            for layer, delta in self.mean.deltas.items()
        }
        return dataclasses.replace(self.mean, deltas=deltas, name=name)

    def project(self, adapter: Adapter) -> Projection:
        """Return the point of the space that is nearest to an adapter, by least squares in ΔR. Errors: as `of`."""
        check_alike(self.mean, adapter)
        gram = torch.zeros(1 + self.count, 1 + self.count, dtype=torch.float64)
        against, whole = torch.zeros(1 + self.count, dtype=torch.float64), 0.0
        for layer, delta in self.mean.deltas.items():
            span = torch.cat([delta[None], self.components[layer]]).double().flatten(1)
            own = adapter.deltas[layer].detach().cpu().double().flatten()
            gram, against, whole = gram + span @ span.T, against + span @ own, whole + float(own @ own)
        found = torch.linalg.pinv(gram, hermitian=True) @ against
        left = whole - 2 * float(found @ against) + float(found @ gram @ found)
        z = found[1:]
        return Projection(
            float(found[0]), tuple(z.tolist()), max(0.0, left / whole) if whole else 0.0, self._nearest(z)
        )

    def _nearest(self, z: Float[Tensor, " k"]) -> dict[str, float]:
        """Return the members by cosine to a point, both less the mean; a coordinate counts by its component's
        length."""
        lengths = torch.tensor(self.variances[: self.count], dtype=torch.float64).sqrt()
        cosines = torch.cosine_similarity(self.coordinates * lengths, (z * lengths)[None], eps=1e-30)
        order = cosines.argsort(descending=True).tolist()
        return {self.members[i][0]: float(cosines[i]) for i in order}


def check_alike(first: Adapter, other: Adapter, remedy: str = OF_ONE_SPACE) -> None:
    """Raise MismatchError unless both are ΔR of one role on the same columns of the same basis."""
    for adapter in (first, other):
        if not adapter.metadata.on_basis:
            raise MismatchError(
                said("%(adapter)s is no ΔR on a basis, so it spans no space", adapter=_called(adapter)),
                expected="method qrlora",
                got=said("method %(method)s", method=adapter.metadata.method),
                remedy="train it with method qrlora, or put it on a basis: `qrlora import FILE --like ADAPTER`",
            )
    facts = [
        {name: getattr(one.metadata, name) for name in LIKE}
        | {"basis": one.metadata.basis_fingerprint, "base model": one.metadata.base_model}
        | {"layers": {name: tuple(shape) for name, shape in one.shapes.items()}}
        for one in (first, other)
    ]
    if facts[0]["basis"] == facts[1]["basis"]:  # the same weights may have been loaded from another place
        for fact in facts:
            del fact["base model"]
    differ = [name for name in facts[0] if facts[0][name] != facts[1].get(name)]
    if differ:
        raise MismatchError(
            said(
                "%(first)s and %(other)s are not of one space: they differ in %(differ)s",
                first=_called(first),
                other=_called(other),
                differ=", ".join(differ),
            ),
            expected={name: facts[0][name] for name in differ},
            got={name: facts[1][name] for name in differ},
            remedy=remedy,
        )
    other.check_sketches(first.sketches)


def _called(adapter: Adapter) -> Said:
    return verbatim(adapter.name) if adapter.name else said("an adapter without a name")


def _blank(adapters: Sequence[Adapter]) -> Adapter:
    """Return the first adapter, with only the metadata that all of them share."""
    metas: list[Any] = [adapter.metadata for adapter in adapters]
    triggers, licences = ({getattr(meta, name) for meta in metas} for name in ("trigger", "licence"))
    metadata = dataclasses.replace(
        metas[0],
        trigger=triggers.pop() if len(triggers) == 1 else "",
        licence=", ".join(sorted(licence or "none given" for licence in licences)) if licences != {""} else "",
        recipe={},
        provenance={},
    )
    return dataclasses.replace(adapters[0], metadata=metadata, name="mean")
