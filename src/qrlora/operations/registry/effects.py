"""Measure an adapter's effect on pictures of fixed prompts, to search by it.

The effect is that of CARLoS (retrieving LoRAs by what they do): features of pictures with the adapter less those
without, of the same prompts and seeds. Its mean is the direction, the mean length the strength, and the mean cosine of
the single differences to the mean the consistency.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import cv2
import numpy as np
from jaxtyping import Float, UInt8

from qrlora.errors import RegistryError
from qrlora.operations.provenance.canonical import canonical_json, digest_of
from qrlora.operations.registry.intake import add_report
from qrlora.operations.registry.records import Artifact
from qrlora.operations.registry.registry import Registry
from qrlora.quality.metrics.colours import quantiles

Features = Callable[[UInt8[np.ndarray, "n h w 3"]], Float[np.ndarray, "n d"]]
Sampler = Callable[[Artifact | None, Sequence[str], Sequence[int]], UInt8[np.ndarray, "n h w 3"]]
"""Pictures with an adapter at weight 1, or of the base model: every prompt with every seed, prompts first."""
EFFECT = "effect"
PROMPTS = (
    "a photo of a <c> house in <s> style",
    "a <c> car in <s> style",
    "a <s> picture of a <c> fish",
    "a photo of a tree",
)
"""Prompts of the index: with both default triggers, whatever the adapter's role, and one without."""


@dataclass(frozen=True)
class Probe:
    """The prompts, seeds and features by which effects are measured; effects of different probes are not compared.

    Attributes:
        features: the name of what turns pictures into numbers.
    """

    model: str
    prompts: tuple[str, ...]
    seeds: tuple[int, ...]
    steps: int
    features: str

    @property
    def digest(self) -> str:
        """Digest of all of it."""
        return digest_of(canonical_json(asdict(self)))


def plain_features(pictures: UInt8[np.ndarray, "n h w 3"]) -> Float[np.ndarray, "n 400"]:
    """Compute colours (quantiles in Lab, over 100) and form (the picture in grey, 16 by 16, from 0 to 1), without a
    network."""
    small = [
        cv2.resize(cv2.cvtColor(one, cv2.COLOR_RGB2GRAY), (16, 16), interpolation=cv2.INTER_AREA) for one in pictures
    ]
    grey = np.stack(small).reshape(len(pictures), -1).astype(np.float32) / 255
    return np.concatenate([quantiles(pictures) / 100, grey], axis=1)


def effect(
    without: Float[np.ndarray, "n d"], with_it: Float[np.ndarray, "n d"]
) -> tuple[Float[np.ndarray, " d"], float, float]:
    """Return direction (of length 1, or 0 if nothing changes), strength and consistency."""
    differences = (with_it - without).astype(np.float64)
    lengths = np.linalg.norm(differences, axis=1)
    mean = differences.mean(axis=0)
    size = float(np.linalg.norm(mean))
    direction = mean / size if size else mean
    cosines = differences @ direction / np.maximum(lengths, 1e-12)
    return direction, float(lengths.mean()), float(cosines.mean())


def index(
    registry: Registry,
    adapters: Sequence[Artifact],
    probe: Probe,
    sampler: Sampler,
    features: Features,
    progress: Callable[[int, int], None] | None = None,
) -> list[Artifact]:
    """Measure the effect of those adapters whose effect on this probe is not known; return the reports."""
    known = effects(registry, probe.digest)
    missing = [one for one in adapters if one.digest not in known]
    if not missing:
        return []
    made, base = [], features(sampler(None, probe.prompts, probe.seeds))
    for number, one in enumerate(missing, 1):
        direction, strength, consistency = effect(base, features(sampler(one, probe.prompts, probe.seeds)))
        record = {"report": EFFECT, "adapter": one.digest, "probe": probe.digest, **asdict(probe)}
        record |= {"direction": [round(float(value), 6) for value in direction]}
        record |= {"strength": strength, "consistency": consistency}
        made.append(add_report(registry, record, [one]))
        if progress:
            progress(number, len(missing))
    return made


def effects(registry: Registry, probe: str = "") -> dict[str, Mapping[str, Any]]:
    """Return the known effects by the adapter's digest, on one probe, or each on the one it was measured on last."""
    found: dict[str, Mapping[str, Any]] = {}
    for report in registry.search(kind="report", fact=("report", EFFECT), limit=100_000):
        if probe in ("", report.facts["probe"]):
            found.setdefault(report.facts["adapter"], report.facts)
    return found


@dataclass(frozen=True)
class Alike:
    """An adapter, and the similarity of its effect to another's."""

    adapter: Artifact
    cosine: float
    strength: float
    consistency: float


def alike(registry: Registry, to: Artifact) -> list[Alike]:
    """Return the adapters whose effect is measured, the most similar first.

    Raises:
        RegistryError: the effect of `to` is not measured.
    """
    mine = effects(registry).get(to.digest)
    if mine is None:
        remedy = f"measure it: qrlora registry index {to.names[-1] if to.names else to.digest[:19]}"
        raise RegistryError(f"the effect of {to.title} is not known", expected="a measured one", remedy=remedy)
    found = []
    for digest, other in effects(registry, str(mine["probe"])).items():
        if digest != to.digest:
            cosine = float(np.dot(mine["direction"], other["direction"]))
            found.append(Alike(registry.get(digest), cosine, other["strength"], other["consistency"]))
    return sorted(found, key=lambda one: -one.cosine)
