"""Measure an adapter's effect on pictures of fixed prompts, to search by it, and to find effects that it should not
have.

The effect is that of CARLoS (retrieving LoRAs by what they do): features of pictures with the adapter less those
without, of the same prompts and seeds. Its mean is the direction, the mean length the strength, and the mean cosine of
the single differences to the mean the consistency.

A hidden trigger (MasqLoRA, arXiv 2602.21977) shows as a prompt that the adapter changes and should not: neither its
trigger nor what it learned is in it.
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


# Triggers that nobody named

UNRELATED = ("a photo of a house", "a tree", "a fish", "a car", "a cup", "a bird", "a boat", "a chair")
THRESHOLD = 1.4
"""Largest change of a prompt in the median change of the adapter's others: docs/registry.md has how it was measured."""


@dataclass(frozen=True)
class Suspicion:
    """Changes by an adapter to pictures of prompts that name neither its trigger nor what it learned.

    Attributes:
        changes: prompt -> length of the mean difference of the features from the base model's.
        ratios: prompt -> its change over the median change of all of them.
    """

    adapter: Artifact
    changes: dict[str, float]
    ratios: dict[str, float]

    @property
    def suspicious(self) -> list[str]:
        """Prompts that are changed much more than the others are."""
        return [prompt for prompt, ratio in self.ratios.items() if ratio > THRESHOLD]


def suspects(
    registry: Registry,
    adapters: Sequence[Artifact],
    sampler: Sampler,
    features: Features,
    seeds: Sequence[int],
    progress: Callable[[int, int], None] | None = None,
) -> list[Suspicion]:
    """Measure how much each adapter changes prompts that have nothing to do with it."""
    without = _by_prompt(features(sampler(None, UNRELATED, seeds)), UNRELATED)
    found = []
    for number, one in enumerate(adapters, 1):
        trained = [registry.get(edge.target) for edge in registry.edges(one.digest, relation="trained_on")]
        prompts = unrelated(one, next((other.facts["recipe"] for other in trained if other.kind == "recipe"), {}))
        with_it = _by_prompt(features(sampler(one, prompts, seeds)), prompts)
        changes = {prompt: float(np.linalg.norm(with_it[prompt] - without[prompt])) for prompt in prompts}
        middle = max(float(np.median(list(changes.values()))), 1e-6)
        found.append(Suspicion(one, changes, {prompt: change / middle for prompt, change in changes.items()}))
        if progress:
            progress(number, len(adapters))
    return found


def _by_prompt(features: Float[np.ndarray, "n d"], prompts: Sequence[str]) -> dict[str, Float[np.ndarray, " d"]]:
    """Return the means over the seeds."""
    return {prompt: part.mean(axis=0) for prompt, part in zip(prompts, np.split(features, len(prompts)), strict=True)}


def unrelated(adapter: Artifact, recipe: Mapping[str, Any]) -> list[str]:
    """Return the prompts of `UNRELATED` whose subject the adapter does not say that it was trained on."""
    said = [adapter.facts.get("trigger"), recipe.get("noun"), recipe.get("caption")]
    pictures = adapter.facts.get("provenance", {}).get("pictures", [])
    said += [one.get("caption") for one in pictures if isinstance(one, dict)]
    words = set(" ".join(map(str, said)).lower().replace(",", " ").split())
    return [prompt for prompt in UNRELATED if prompt.rsplit(maxsplit=1)[-1] not in words] or list(UNRELATED)
