"""The metrics of a picture, in one table.

    metrics = select_metrics(["colours", "texture"], pictures, references)
    compute_metrics(pictures, references, metrics)

Each metric states its inputs, direction and source; docs/evaluate.md describes what it is blind to. With several
references a metric is the mean over them; `copied` is the maximum over the training pictures.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import cv2
import numpy as np
from jaxtyping import Float, UInt8

from qrlora.errors import DataError
from qrlora.quality.images.read import MeasuredPicture
from qrlora.quality.metrics.colours import quantiles
from qrlora.quality.metrics.copies import copy_score, edge_agreement, edges_of

if TYPE_CHECKING:
    from qrlora.quality.metrics.learned import FeatureNetworks

NEEDS = {
    "subject": "--subject",
    "style": "--style",
    "training": "--training",
    "palette": "--palette, or a brand sheet with one",
    "mask": "a mask: mug.mask.png beside mug.png, or transparency",
    "prompt": "--prompt, or mug.txt beside mug.png",
}
"""Inputs of metrics, and how the command line gives them."""
OF_PICTURE = ("mask", "prompt")
"""Inputs that belong to each picture; a picture without them has no value."""
TEXTURE_SIDE = 512
"""Largest short side in pixels at which textures are compared."""
RADII = (1, 2, 4)
"""Distances in pixels between compared neighbours: fine, medium and coarse texture."""
LEVELS = 16


@dataclass(frozen=True, eq=False)
class References:
    """Reference pictures, and a palette of #rrggbb colours."""

    subject: Sequence[MeasuredPicture] = ()
    style: Sequence[MeasuredPicture] = ()
    training: Sequence[MeasuredPicture] = ()
    palette: Sequence[str] = ()


Compute = Callable[[MeasuredPicture, References, Any], float]


@dataclass(frozen=True)
class Metric:
    """A row of the table. network: the name in `learned.NETWORKS` of the network it needs, if any."""

    name: str
    description: str
    needs: tuple[str, ...]
    better: Literal["higher", "lower"]
    unit: str
    bounds: tuple[float, float]
    source: str
    compute: Compute
    network: str = ""


def select_metrics(
    names: Sequence[str] | None, pictures: Sequence[MeasuredPicture], references: References
) -> list[Metric]:
    """Select metrics by name. None: all that need no network and whose inputs are given; "all": with networks.

    Raises:
        DataError: an unknown name, or a metric whose inputs are missing.
    """
    if names is None or list(names) == ["all"]:
        found = [
            m for m in METRICS.values() if (names or not m.network) and not _missing_inputs(m, pictures, references)
        ]
        if not found:
            expected = "; ".join(f"{need}: {how}" for need, how in NEEDS.items() if need not in OF_PICTURE)
            raise DataError("nothing to compare the pictures with", expected=f"at least one of {expected}")
        return found
    unknown = [name for name in names if name not in METRICS]
    if unknown:
        near = difflib.get_close_matches(unknown[0], METRICS, 1, 0.5)
        remedy = f"did you mean {near[0]}?" if near else "`qrlora evaluate --help` lists them"
        raise DataError("unknown metric", expected=", ".join(METRICS), got=", ".join(unknown), remedy=remedy)
    for name in names:
        missing = _missing_inputs(METRICS[name], pictures, references)
        if missing:
            ways = "; ".join(NEEDS[need] for need in missing)
            raise DataError(
                f"{name} lacks an input", expected=ways, got="none", remedy="give it, or leave the metric out"
            )
    return [METRICS[name] for name in dict.fromkeys(names)]


def _missing_inputs(metric: Metric, pictures: Sequence[MeasuredPicture], references: References) -> list[str]:
    def met(need: str) -> bool:
        if need in OF_PICTURE:
            return any(_has(picture, need) for picture in pictures)
        return bool(getattr(references, need))

    return [need for need in metric.needs if not met(need)]


def _has(picture: MeasuredPicture, need: str) -> bool:
    return picture.mask is not None if need == "mask" else bool(picture.prompt)


def compute_metrics(
    pictures: Sequence[MeasuredPicture],
    references: References,
    metrics: Sequence[Metric],
    networks: FeatureNetworks | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> list[dict[str, float | None]]:
    """Compute for each picture its values by name of the metric; None where it lacks the mask or prompt.

    Raises:
        ModelError: a network's weights are missing.
    """
    if networks is None and any(one.network for one in metrics):
        from qrlora.quality.metrics.learned import FeatureNetworks

        networks = FeatureNetworks()
    for name in dict.fromkeys(one.network for one in metrics if one.network):
        assert networks is not None
        networks.load(name)  # fails before the slow metrics, if it must
    rows: list[dict[str, float | None]] = []
    for picture in pictures:
        rows.append({one.name: _value(one, picture, references, networks) for one in metrics})
        if progress:
            progress(len(rows), len(pictures))
    return rows


def _value(
    one: Metric, picture: MeasuredPicture, references: References, networks: FeatureNetworks | None
) -> float | None:
    if not all(_has(picture, need) for need in one.needs if need in OF_PICTURE):
        return None
    return float(one.compute(picture, references, networks))


# colours


def _palette(picture: MeasuredPicture, references: References, _: Any) -> float:
    return _to_palette(picture, references.palette, picture.colours.picture_shares)


def _palette_subject(picture: MeasuredPicture, references: References, _: Any) -> float:
    shares = picture.colours.subject_shares
    return _to_palette(picture, references.palette, picture.colours.picture_shares if shares is None else shares)


def _to_palette(picture: MeasuredPicture, palette: Sequence[str], shares: Float[np.ndarray, " k"]) -> float:
    return float(picture.colours.differences(palette).min(axis=1) @ shares)


def _colours(picture: MeasuredPicture, reference: MeasuredPicture) -> float:
    both = [cv2.resize(one.pixels, (256, 256), interpolation=cv2.INTER_AREA) for one in (picture, reference)]
    ours, theirs = quantiles(np.stack(both))
    return float(np.abs(ours - theirs).mean())


# form, in place


def _edges(picture: MeasuredPicture, reference: MeasuredPicture) -> float:
    ours, theirs, mask = _side_by_side(picture, reference)
    counted = np.ones_like(ours, bool) if mask is None else mask >= 0.5
    tolerance = 0.0075 * float(np.hypot(*ours.shape))  # of the diagonal, as in Berkeley's benchmark of boundaries
    return edge_agreement(edges_of(ours) & counted, edges_of(theirs) & counted, tolerance)


def _structure(picture: MeasuredPicture, reference: MeasuredPicture) -> float:
    from skimage.metrics import structural_similarity

    ours, theirs, mask = _side_by_side(picture, reference)
    options: dict[str, Any] = {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False}
    _, places = structural_similarity(ours, theirs, data_range=255, full=True, **options)
    return float(places.mean() if mask is None else (places * mask).sum() / mask.sum())


def _side_by_side(
    picture: MeasuredPicture, reference: MeasuredPicture
) -> tuple[UInt8[np.ndarray, "h w"], UInt8[np.ndarray, "h w"], Float[np.ndarray, "h w"] | None]:
    """Return picture and reference in grey at the picture's size, and the reference's mask, inside which they are
    compared."""
    height, width = picture.pixels.shape[:2]
    ours, theirs = (cv2.cvtColor(p, cv2.COLOR_RGB2GRAY) for p in (picture.pixels, reference.fitted(width, height)))
    return ours, theirs, reference.fitted_mask(width, height)


# texture, wherever it is


def _texture(picture: MeasuredPicture, reference: MeasuredPicture) -> float:
    from skimage.feature import local_binary_pattern

    def histograms(grey: UInt8[np.ndarray, "h w"]) -> list[Float[np.ndarray, " bins"]]:
        found = [local_binary_pattern(grey, 8, radius, "uniform").astype(np.int64) for radius in RADII]
        return [np.bincount(codes.reshape(-1), minlength=10) / codes.size for codes in found]

    return _mean_distance(*map(histograms, _at_one_scale(picture, reference)))


def _grain(picture: MeasuredPicture, reference: MeasuredPicture) -> float:
    from skimage.feature import graycomatrix

    angles = [0, np.pi / 4, np.pi / 2, 3 * np.pi / 4]

    def pairs(grey: UInt8[np.ndarray, "h w"]) -> list[Float[np.ndarray, " bins"]]:
        levels = (grey.astype(np.int64) * LEVELS // 256).astype(np.uint8)
        counts = graycomatrix(levels, list(RADII), angles, LEVELS, symmetric=True, normed=True).mean(axis=3)
        return [counts[:, :, i].reshape(-1) for i in range(len(RADII))]

    return _mean_distance(*map(pairs, _at_one_scale(picture, reference)))


def _mean_distance(ours: Sequence[Float[np.ndarray, " bins"]], theirs: Sequence[Float[np.ndarray, " bins"]]) -> float:
    """Return the mean Jensen-Shannon distance (base 2: 0 if equal, 1 if disjoint) of histograms, pair by pair."""
    from scipy.spatial.distance import jensenshannon

    return float(np.mean([jensenshannon(a, b, base=2) for a, b in zip(ours, theirs, strict=True)]))


def _at_one_scale(
    picture: MeasuredPicture, reference: MeasuredPicture
) -> tuple[UInt8[np.ndarray, "h w"], UInt8[np.ndarray, "h2 w2"]]:
    side = min(TEXTURE_SIDE, *picture.pixels.shape[:2])

    def grey(one: MeasuredPicture) -> UInt8[np.ndarray, "h w"]:
        height, width = one.pixels.shape[:2]
        scale = side / min(height, width)
        size = max(side, round(width * scale)), max(side, round(height * scale))
        kind = cv2.INTER_AREA if scale < 1 else cv2.INTER_LINEAR
        return cv2.cvtColor(cv2.resize(one.pixels, size, interpolation=kind), cv2.COLOR_RGB2GRAY)

    return grey(picture), grey(reference)


def _copied(picture: MeasuredPicture, references: References, _: Any) -> float:
    return max(copy_score(picture.pixels, one.pixels) for one in references.training)


# metrics against several references


def _against(
    what: Literal["subject", "style"], compare: Callable[[MeasuredPicture, MeasuredPicture], float]
) -> Compute:
    """Return a metric that is the mean of `compare` over the references."""
    return lambda picture, given, _: float(np.mean([compare(picture, one) for one in getattr(given, what)]))


def _network_similarity(model: str, what: Literal["subject", "style"]) -> Compute:
    """Return a metric that is the mean cosine to the references."""
    return lambda picture, given, networks: float(
        np.mean([networks.similarity(model, picture, one) for one in getattr(given, what)])
    )


def _lpips(picture: MeasuredPicture, references: References, networks: FeatureNetworks) -> float:
    return float(np.mean([networks.distance(picture, one) for one in references.subject]))


def _prompt_similarity(picture: MeasuredPicture, _: References, networks: FeatureNetworks) -> float:
    return networks.text_similarity(picture, picture.prompt)


COSINE = (-1.0, 1.0)
_ROWS = (
    Metric(
        "palette", "mean colour difference of every pixel to the nearest colour of the palette", ("palette",), "lower",
        "ΔE00", (0.0, 100.0), "CIEDE2000, Sharma et al. 2005", _palette,
    ),
    Metric(
        "palette_subject", "the same, under the picture's mask", ("palette", "mask"), "lower",
        "ΔE00", (0.0, 100.0), "CIEDE2000, Sharma et al. 2005", _palette_subject,
    ),
    Metric(
        "colours", "distance in Lab of the distribution of colours from the style picture's", ("style",), "lower",
        "ΔE76", (0.0, 100.0), "sliced Wasserstein distance, Bonneel et al. 2015", _against("style", _colours),
    ),
    Metric(
        "texture", "difference of local patterns from the style picture's, whatever brightness and contrast",
        ("style",), "lower", "", (0.0, 1.0), "local binary patterns, Ojala et al. 2002", _against("style", _texture),
    ),
    Metric(
        "grain", "difference of neighbouring grey levels from the style picture's", ("style",), "lower",
        "", (0.0, 1.0), "grey-level co-occurrence, Haralick et al. 1973", _against("style", _grain),
    ),
    Metric(
        "edges", "share of edges that lie where the subject picture's do", ("subject",), "higher",
        "", (0.0, 1.0), "boundary F-measure, Martin et al. 2004", _against("subject", _edges),
    ),
    Metric(
        "structure", "structural similarity to the subject picture, place by place", ("subject",), "higher",
        "", COSINE, "SSIM, Wang et al. 2004", _against("subject", _structure),
    ),
    Metric(
        "copied", "edge agreement with the most similar training picture after registration", ("training",),
        "lower", "", (0.0, 1.0), "SIFT and ECC registration, boundary F-measure", _copied,
    ),
    Metric(
        "dino", "similarity to the subject picture", ("subject",), "higher",
        "", COSINE, "DINOv2, Oquab et al. 2023", _network_similarity("dino", "subject"), "dino",
    ),
    Metric(
        "clip_i", "similarity to the subject picture", ("subject",), "higher",
        "", COSINE, "CLIP-I, Radford et al. 2021", _network_similarity("clip", "subject"), "clip",
    ),
    Metric(
        "clip_style", "similarity to the style picture", ("style",), "higher",
        "", COSINE, "CLIP, Radford et al. 2021", _network_similarity("clip", "style"), "clip",
    ),
    Metric(
        "clip_t", "similarity of the picture to its prompt", ("prompt",), "higher",
        "", COSINE, "CLIP-T, Radford et al. 2021", _prompt_similarity, "clip",
    ),
    Metric(
        "csd", "similarity in style to the style picture", ("style",), "higher",
        "", COSINE, "CSD, Somepalli et al. 2024", _network_similarity("csd", "style"), "csd",
    ),
    Metric(
        "lpips", "perceptual distance to the subject picture, place by place", ("subject",), "lower",
        "", (0.0, 1.5), "LPIPS, Zhang et al. 2018", _lpips, "lpips",
    ),
)  # fmt: skip
METRICS: Mapping[str, Metric] = {row.name: row for row in _ROWS}
