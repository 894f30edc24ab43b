"""Judge whether a picture shows the subject asked for, in the style asked for.

A classifier alone is easily pleased, so each answer must hold on every criterion it has, and the first two do not look
at each other's question:

- **subject right**: the network names the subject (it may also answer "none of these"), and the subject features lie as
  close to renders of that subject, in whatever style and colours, as renders do.
- **style right**: the network names the style, the style features lie as close to renders in that style, of whatever
  subject, and the colours to the palette of one of them.
- **both right**: subject and style right, and besides the features and the colours lie close to true renders of that
  very pair.

Short of right there is **recognised**, which asks what a picture shows and not how well: of the subjects and styles
that the world has, without the answer "none of these", the likeliest are those asked for.

Closeness of features is a Mahalanobis distance with a pooled covariance (Lee et al. 2018, "A simple unified framework
for detecting out-of-distribution samples"); closeness of colours a sliced Wasserstein distance to the nearest true
palette (``colours``). Every distance is given in units of its limit, which true renders set: 1 is just accepted. No
palette is refused for a difference that cannot be seen.

    >>> judge = Judge.load()
    >>> judge.verdict(pictures, "mug", "neon", "red").rates()
    {'subject': 0.98, 'style': 0.97, 'both': 0.96}
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int64, UInt8
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

from qrlora.errors import DataError, ModelError
from qrlora.pico.judge.network import Network
from qrlora.pico.world import COLOURS, SIZE, STYLES, SUBJECTS
from qrlora.quality.metrics.colours import quantiles

__all__ = ["Judge", "Verdict"]

WEIGHTS = Path(__file__).parents[1] / "weights"
_COMMAND = "python -m qrlora.pico.judge --work DIR"


@dataclass(frozen=True)
class Verdict:
    """The judge's answers about n pictures. Distances are in units of their limit; above 1 is refused."""

    subject: Bool[np.ndarray, " n"]
    style: Bool[np.ndarray, " n"]
    p_subject: Float[np.ndarray, " n"]
    p_style: Float[np.ndarray, " n"]
    among: dict[str, Float[np.ndarray, " n"]]  # "subject" and "style": probability, "none of these" left out
    recognised: Bool[np.ndarray, " n"]  # both asked for are the likeliest of the world's
    distance: dict[str, Float[np.ndarray, " n"]]  # by the names of ``Judge.limits``

    @property
    def both(self) -> Bool[np.ndarray, " n"]:
        """Subject right, style right, and close to true renders of the pair."""
        return self.subject & self.style & self._within("pair") & self._within("pair_palette")

    @property
    def excess(self) -> Float[np.ndarray, " n"]:
        """Return the distance of each picture beyond its limits: mean of ln max(1, distance). 0 where all are kept.

        It orders what is wrong, where shares of what is right are too coarse to choose by.
        """
        return np.mean([np.log(np.maximum(away, 1)) for away in self.distance.values()], axis=0)

    def _within(self, name: str) -> Bool[np.ndarray, " n"]:
        return self.distance[name] <= 1

    def rates(self) -> dict[str, float]:
        """Share of pictures right, by factor: {"subject": ..., "style": ..., "both": ...}."""
        return {name: float(getattr(self, name).mean()) for name in ("subject", "style", "both")}


@dataclass(frozen=True)
class Evidence:
    """Measurements of n pictures against n pairs, before any limit is applied."""

    right: dict[str, Bool[np.ndarray, " n"]]  # "subject" and "style": is the most probable name the one asked for
    probability: dict[str, Float[np.ndarray, " n"]]  # of the name asked for
    among: dict[str, Float[np.ndarray, " n"]]  # the same, of the world's names alone
    likeliest: dict[str, Bool[np.ndarray, " n"]]  # of these
    distance: dict[str, Float[np.ndarray, " n"]]  # of features in standard deviations, of palettes in Lab units


class Judge:
    """The network, what true renders look like to it, and how far from them a picture may lie.

    tables: ``subject.whiten`` (48, 48) and ``subject.means`` (subjects, 48), ``style.whiten`` and ``style.means``
    (styles, 48), ``pair.whiten`` (96, 96) and ``pair.means`` (subjects, styles, 96), all means whitened; for each style
    ``palettes.<style>`` int8 (subjects, colours, backgrounds or 1, 144): see ``quantiles``.
    limits: {"subject": one a subject; "style", "palette", "pair", "pair_palette": one a style}.
    """

    def __init__(self, network: Network, tables: dict[str, Tensor], limits: dict[str, np.ndarray]):
        self.network = network.eval().to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.tables, self.limits = tables, limits

    @classmethod
    def load(cls, folder: Path = WEIGHTS) -> Judge:
        """The judge that ships with the package.

        Raises ModelError if its files are missing, or were trained on a world with other subjects or styles.
        """
        facts_file, weights_file = folder / "judge.json", folder / "judge.safetensors"
        if not facts_file.exists() or not weights_file.exists():
            raise ModelError("the judge has no weights", expected=weights_file, got="no such file", remedy=_COMMAND)
        facts = json.loads(facts_file.read_text())
        for noun, names in (("subjects", SUBJECTS), ("styles", STYLES)):
            if facts[noun] != list(names):
                raise ModelError(
                    f"the judge was trained on other {noun}", expected=list(names), got=facts[noun], remedy=_COMMAND
                )
        tensors = load_file(weights_file)
        network = Network(len(SUBJECTS), len(STYLES))
        state = {k.removeprefix("network."): v.float() for k, v in tensors.items() if k.startswith("network.")}
        network.load_state_dict(state | _counters(network))
        tables = {k: v for k, v in tensors.items() if not k.startswith("network.")}
        return cls(network, tables, {k: np.array(v) for k, v in facts["limits"].items()})

    @torch.inference_mode()
    def look(self, pictures: UInt8[np.ndarray, "n h w 3"]) -> dict[str, tuple[Tensor, Tensor]]:
        """{"subject" | "style": (features (n, 48), probabilities (n, names + 1))}, in float32."""
        parts = []
        for chunk in torch.from_numpy(pictures).split(64):
            parts.append(self.network(chunk.permute(0, 3, 1, 2).float() / 127.5 - 1))
        return {
            f: (torch.cat([p[f][0] for p in parts]), torch.cat([p[f][1] for p in parts]).softmax(1)) for f in parts[0]
        }

    def evidence(
        self,
        pictures: UInt8[np.ndarray, "n h w 3"],
        subject: Int64[np.ndarray, " n"],
        style: Int64[np.ndarray, " n"],
        colour: Int64[np.ndarray, " n"],
    ) -> Evidence:
        """Measure pictures against the pairs asked for, given as positions in the world's tables (colour -1: any)."""
        asked = {"subject": subject, "style": style}
        right, probability, among, likeliest, distance, features = {}, {}, {}, {}, {}, []
        for factor, (found, p) in self.look(pictures).items():
            names = p[:, :-1]
            right[factor] = p.argmax(1).numpy() == asked[factor]
            probability[factor] = p.numpy()[np.arange(len(p)), asked[factor]]
            among[factor] = probability[factor] / names.sum(1).clamp(min=torch.finfo(p.dtype).tiny).numpy()
            likeliest[factor] = names.argmax(1).numpy() == asked[factor]
            distance[factor] = self._away(factor, found, asked[factor])
            features.append(found)
        distance["pair"] = self._away("pair", torch.cat(features, 1), (subject, style))
        distance |= self._palettes(quantiles(pictures), subject, style, colour)
        return Evidence(right, probability, among, likeliest, distance)

    def _away(self, table: str, features: Tensor, asked: Any) -> Float[np.ndarray, " n"]:
        """Root mean square, over whitened features, of the way to the means at the positions asked for."""
        away = features @ self.tables[f"{table}.whiten"] - self.tables[f"{table}.means"][asked]
        return away.square().mean(1).sqrt().numpy()

    def _palettes(
        self,
        found: Float[np.ndarray, "n 144"],
        subject: Int64[np.ndarray, " n"],
        style: Int64[np.ndarray, " n"],
        colour: Int64[np.ndarray, " n"],
    ) -> dict[str, Float[np.ndarray, " n"]]:
        """Distance to the nearest palette of the style, and to the nearest of the pair."""
        near = np.empty((2, len(found)), np.float32)
        for i, (s, t, c) in enumerate(zip(subject, style, colour, strict=True)):
            known = self.tables[f"palettes.{list(STYLES)[t]}"].numpy()[:, slice(None) if c < 0 else c]
            away = np.abs(known.astype(np.float32) - found[i]).mean(-1).reshape(len(known), -1).min(1)
            near[:, i] = away.min(), away[s]
        return {"palette": near[0], "pair_palette": near[1]}

    def verdict(
        self,
        pictures: UInt8[np.ndarray, "n h w 3"],
        subject: str | Sequence[str | None],
        style: str | Sequence[str | None],
        colour: str | Sequence[str | None] | None = None,
    ) -> Verdict:
        """Judge each picture against the subject, style and (if it was asked for) colour named: one name for all, or n.

        Raises DataError for pictures of another shape than (n, 128, 128, 3), for a name the world lacks, or for a
        number of names that is not n.
        """
        n = len(pictures)
        if pictures.shape != (n, SIZE, SIZE, 3) or n == 0:
            raise DataError("pictures the judge cannot look at", expected=("n >= 1", SIZE, SIZE, 3), got=pictures.shape)
        s, t = _positions("subject", subject, list(SUBJECTS), n), _positions("style", style, list(STYLES), n)
        seen = self.evidence(pictures, s, t, _positions("colour", colour, list(COLOURS), n))
        beyond = {k: seen.distance[k] / self.limits[k][s if k == "subject" else t] for k in seen.distance}
        return Verdict(
            subject=seen.right["subject"] & (beyond["subject"] <= 1),
            style=seen.right["style"] & (beyond["style"] <= 1) & (beyond["palette"] <= 1),
            p_subject=seen.probability["subject"],
            p_style=seen.probability["style"],
            among=seen.among,
            recognised=seen.likeliest["subject"] & seen.likeliest["style"],
            distance=beyond,
        )

    def likeness(
        self, part: str, pictures: UInt8[np.ndarray, "n h w 3"], references: UInt8[np.ndarray, "m h w 3"]
    ) -> list[float]:
        """Return for each picture the mean cosine of its features of a part ("subject" or "style") to the references'.

        It needs no name, so it also measures what pico's world has no word for.
        """
        features = self.look(np.concatenate([references, pictures]))[part][0]
        whole = torch.nn.functional.normalize(features, dim=1)
        return [float(cosine) for cosine in (whole[len(references) :] @ whole[: len(references)].T).mean(1)]

    def objective(self, part: str, name: str) -> Callable[[UInt8[np.ndarray, "n h w 3"]], Float[np.ndarray, " n"]]:
        """A score of each picture that should show this subject, or be in this style, whatever else it is: the mean of
        the probability of its name and of being right. 1 is perfect.

        Raises DataError if pico's world has no such subject or style.
        """
        _positions(part, name, list(STYLES if part == "style" else SUBJECTS), 1)
        asked = {"subject": next(iter(SUBJECTS)), "style": next(iter(STYLES)), part: name}

        def score(pictures: UInt8[np.ndarray, "n h w 3"]) -> Float[np.ndarray, " n"]:
            verdict = self.verdict(pictures, **asked)
            return (getattr(verdict, part) + getattr(verdict, f"p_{part}")) / 2

        return score

    def scorer(self, name: str) -> Callable[[Sequence[Image.Image]], float]:
        """The mean of `objective` over pictures."""
        of = self.objective("style" if name in STYLES else "subject", name)

        def score(pictures: Sequence[Image.Image]) -> float:
            return float(of(np.stack([np.asarray(picture.convert("RGB")) for picture in pictures])).mean())

        score.__name__ = f"pico's judge, asked for {name}"
        return score


def _counters(network: Network) -> dict[str, Tensor]:
    """Batch norm's step counters: nothing reads them after training, so the file leaves them out."""
    return {k: v for k, v in network.state_dict().items() if k.endswith("num_batches_tracked")}


def _positions(
    noun: str, asked: str | Sequence[str | None] | None, names: list[str], n: int
) -> Int64[np.ndarray, " n"]:
    """Positions in ``names`` of the names asked for; -1 for a colour left open."""
    each = [asked] * n if asked is None or isinstance(asked, str) else list(asked)
    if len(each) != n:
        raise DataError(f"a {noun} for every picture is needed", expected=n, got=len(each))
    for name in each:
        if name not in names and not (noun == "colour" and name is None):
            near = get_close_matches(str(name), names, 1)
            remedy = f"did you mean {near[0]!r}?" if near else None
            raise DataError(f"a {noun} that pico's world lacks", expected=names, got=name, remedy=remedy)
    return np.array([-1 if name is None else names.index(name) for name in each])
