"""What can be measured of a picture: one table, and nothing that is not in it.

    measure(pictures, References(style=[chalk]), chosen(["colours", "texture"], pictures, references))

Every measure says what it needs, which way is better, and where it comes from; docs/evaluate.md says what each does not
tell. Against several references a measure is the mean over them; of several training pictures the likest counts.
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
from qrlora.quality.images.read import Exhibit
from qrlora.quality.metrics.colours import quantiles
from qrlora.quality.metrics.copies import edge_agreement, edges_of, likeness

if TYPE_CHECKING:
    from qrlora.quality.metrics.learned import Eyes

NEEDS = {
    "subject": "--subject",
    "style": "--style",
    "training": "--training",
    "palette": "--palette, or a brand sheet with one",
    "mask": "a mask: mug.mask.png beside mug.png, or transparency",
    "prompt": "--prompt, or mug.txt beside mug.png",
}
"""What a measure may need, and how it is given."""
OF_PICTURE = ("mask", "prompt")
"""Needs that each picture meets for itself: one without has no value."""
TEXTURE_SIDE = 512
"""Largest short side in pixels at which textures are compared."""
RADII = (1, 2, 4)
"""Distances in pixels at which neighbours are compared: fine, middle and coarse texture."""
LEVELS = 16


@dataclass(frozen=True, eq=False)
class References:
    """What pictures are held against; `palette` as #rrggbb."""

    subject: Sequence[Exhibit] = ()
    style: Sequence[Exhibit] = ()
    training: Sequence[Exhibit] = ()
    palette: Sequence[str] = ()


Compute = Callable[[Exhibit, References, Any], float]


@dataclass(frozen=True)
class Measure:
    """A row of the table. about: what it says. model: the name in `learned.MODELS` of the network it needs, if any."""

    name: str
    about: str
    needs: tuple[str, ...]
    better: Literal["higher", "lower"]
    unit: str
    bounds: tuple[float, float]
    source: str
    compute: Compute
    model: str = ""

    def oriented(self, value: float) -> float:
        """The value, turned so that more is better."""
        return value if self.better == "higher" else -value


def chosen(names: Sequence[str] | None, pictures: Sequence[Exhibit], references: References) -> list[Measure]:
    """The measures of these names; all that need no weights and have what they need if None; "all" adds the others.

    Raises:
        DataError: an unknown name, or a measure that lacks what it needs.
    """
    if names is None or list(names) == ["all"]:
        found = [m for m in MEASURES.values() if (names or not m.model) and not _lacking(m, pictures, references)]
        if not found:
            expected = "; ".join(f"{need}: {how}" for need, how in NEEDS.items() if need not in OF_PICTURE)
            raise DataError("nothing to hold the pictures against", expected=f"at least one of {expected}")
        return found
    unknown = [name for name in names if name not in MEASURES]
    if unknown:
        near = difflib.get_close_matches(unknown[0], MEASURES, 1, 0.5)
        remedy = f"did you mean {near[0]}?" if near else "`qrlora evaluate --help` lists them"
        raise DataError("no such measure", expected=", ".join(MEASURES), got=", ".join(unknown), remedy=remedy)
    for name in names:
        lacking = _lacking(MEASURES[name], pictures, references)
        if lacking:
            ways = "; ".join(NEEDS[need] for need in lacking)
            raise DataError(f"{name} cannot be measured", expected=ways, got="none", remedy="give it, or leave it out")
    return [MEASURES[name] for name in dict.fromkeys(names)]


def _lacking(measure: Measure, pictures: Sequence[Exhibit], references: References) -> list[str]:
    def met(need: str) -> bool:
        if need in OF_PICTURE:
            return any(_has(picture, need) for picture in pictures)
        return bool(getattr(references, need))

    return [need for need in measure.needs if not met(need)]


def _has(picture: Exhibit, need: str) -> bool:
    return picture.mask is not None if need == "mask" else bool(picture.prompt)


def measure(
    pictures: Sequence[Exhibit],
    references: References,
    measures: Sequence[Measure],
    eyes: Eyes | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> list[dict[str, float | None]]:
    """For every picture the value of every measure by name; None where the picture has no mask or prompt for it.

    Raises:
        ModelError: a network's weights are missing.
    """
    if eyes is None and any(one.model for one in measures):
        from qrlora.quality.metrics.learned import Eyes

        eyes = Eyes()
    for name in dict.fromkeys(one.model for one in measures if one.model):
        assert eyes is not None
        eyes.load(name)  # before an hour of other measures
    rows: list[dict[str, float | None]] = []
    for picture in pictures:
        rows.append({one.name: _value(one, picture, references, eyes) for one in measures})
        if progress:
            progress(len(rows), len(pictures))
    return rows


def _value(one: Measure, picture: Exhibit, references: References, eyes: Eyes | None) -> float | None:
    if not all(_has(picture, need) for need in one.needs if need in OF_PICTURE):
        return None
    return float(one.compute(picture, references, eyes))


# colours


def _palette(picture: Exhibit, references: References, _: Any) -> float:
    return _to_palette(picture, references.palette, picture.colours.picture)


def _palette_subject(picture: Exhibit, references: References, _: Any) -> float:
    shares = picture.colours.subject
    return _to_palette(picture, references.palette, picture.colours.picture if shares is None else shares)


def _to_palette(picture: Exhibit, palette: Sequence[str], shares: Float[np.ndarray, " k"]) -> float:
    return float(picture.colours.away(palette).min(axis=1) @ shares)


def _colours(picture: Exhibit, reference: Exhibit) -> float:
    both = [cv2.resize(one.pixels, (256, 256), interpolation=cv2.INTER_AREA) for one in (picture, reference)]
    ours, theirs = quantiles(np.stack(both))
    return float(np.abs(ours - theirs).mean())


# form, in place


def _edges(picture: Exhibit, reference: Exhibit) -> float:
    ours, theirs, mask = _side_by_side(picture, reference)
    counted = np.ones_like(ours, bool) if mask is None else mask >= 0.5
    tolerance = 0.0075 * float(np.hypot(*ours.shape))  # of the diagonal, as in Berkeley's benchmark of boundaries
    return edge_agreement(edges_of(ours) & counted, edges_of(theirs) & counted, tolerance)


def _structure(picture: Exhibit, reference: Exhibit) -> float:
    from skimage.metrics import structural_similarity

    ours, theirs, mask = _side_by_side(picture, reference)
    options: dict[str, Any] = {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False}
    _, places = structural_similarity(ours, theirs, data_range=255, full=True, **options)
    return float(places.mean() if mask is None else (places * mask).sum() / mask.sum())


def _side_by_side(
    picture: Exhibit, reference: Exhibit
) -> tuple[UInt8[np.ndarray, "h w"], UInt8[np.ndarray, "h w"], Float[np.ndarray, "h w"] | None]:
    """Both in grey at the picture's size, and the reference's mask, which says where they are compared."""
    height, width = picture.pixels.shape[:2]
    ours, theirs = (cv2.cvtColor(p, cv2.COLOR_RGB2GRAY) for p in (picture.pixels, reference.fitted(width, height)))
    return ours, theirs, reference.fitted_mask(width, height)


# texture, wherever it is


def _texture(picture: Exhibit, reference: Exhibit) -> float:
    from skimage.feature import local_binary_pattern

    def histograms(grey: UInt8[np.ndarray, "h w"]) -> list[Float[np.ndarray, " bins"]]:
        found = [local_binary_pattern(grey, 8, radius, "uniform").astype(np.int64) for radius in RADII]
        return [np.bincount(codes.reshape(-1), minlength=10) / codes.size for codes in found]

    return _apart(*map(histograms, _at_one_scale(picture, reference)))


def _grain(picture: Exhibit, reference: Exhibit) -> float:
    from skimage.feature import graycomatrix

    angles = [0, np.pi / 4, np.pi / 2, 3 * np.pi / 4]

    def pairs(grey: UInt8[np.ndarray, "h w"]) -> list[Float[np.ndarray, " bins"]]:
        levels = (grey.astype(np.int64) * LEVELS // 256).astype(np.uint8)
        counts = graycomatrix(levels, list(RADII), angles, LEVELS, symmetric=True, normed=True).mean(axis=3)
        return [counts[:, :, i].reshape(-1) for i in range(len(RADII))]

    return _apart(*map(pairs, _at_one_scale(picture, reference)))


def _apart(ours: Sequence[Float[np.ndarray, " bins"]], theirs: Sequence[Float[np.ndarray, " bins"]]) -> float:
    """Mean Jensen-Shannon distance (base 2: 0 if alike, 1 if nothing is shared) of histograms, one by one."""
    from scipy.spatial.distance import jensenshannon

    return float(np.mean([jensenshannon(a, b, base=2) for a, b in zip(ours, theirs, strict=True)]))


def _at_one_scale(picture: Exhibit, reference: Exhibit) -> tuple[UInt8[np.ndarray, "h w"], UInt8[np.ndarray, "h2 w2"]]:
    side = min(TEXTURE_SIDE, *picture.pixels.shape[:2])

    def grey(one: Exhibit) -> UInt8[np.ndarray, "h w"]:
        height, width = one.pixels.shape[:2]
        scale = side / min(height, width)
        size = max(side, round(width * scale)), max(side, round(height * scale))
        kind = cv2.INTER_AREA if scale < 1 else cv2.INTER_LINEAR
        return cv2.cvtColor(cv2.resize(one.pixels, size, interpolation=kind), cv2.COLOR_RGB2GRAY)

    return grey(picture), grey(reference)


def _copied(picture: Exhibit, references: References, _: Any) -> float:
    return max(likeness(picture.pixels, one.pixels) for one in references.training)


# what references are compared by


def _against(what: Literal["subject", "style"], compare: Callable[[Exhibit, Exhibit], float]) -> Compute:
    """Mean over the references."""
    return lambda picture, given, _: float(np.mean([compare(picture, one) for one in getattr(given, what)]))


def _seen_by(model: str, what: Literal["subject", "style"]) -> Compute:
    """Mean cosine to the references."""
    return lambda picture, given, eyes: float(
        np.mean([eyes.likeness(model, picture, one) for one in getattr(given, what)])
    )


def _lpips(picture: Exhibit, references: References, eyes: Eyes) -> float:
    return float(np.mean([eyes.distance(picture, one) for one in references.subject]))


def _said(picture: Exhibit, _: References, eyes: Eyes) -> float:
    return eyes.fit(picture, picture.prompt)


COSINE = (-1.0, 1.0)
_ROWS = (
    Measure(
        "palette", "mean colour difference of every pixel to the nearest colour of the palette", ("palette",), "lower",
        "ΔE00", (0.0, 100.0), "CIEDE2000, Sharma et al. 2005", _palette,
    ),
    Measure(
        "palette_subject", "the same, under the picture's mask", ("palette", "mask"), "lower",
        "ΔE00", (0.0, 100.0), "CIEDE2000, Sharma et al. 2005", _palette_subject,
    ),
    Measure(
        "colours", "how far pixels would have to move in Lab to have the style picture's colours", ("style",), "lower",
        "ΔE76", (0.0, 100.0), "sliced Wasserstein distance, Bonneel et al. 2015", _against("style", _colours),
    ),
    Measure(
        "texture", "difference of local patterns from the style picture's, brightness and contrast apart", ("style",),
        "lower", "", (0.0, 1.0), "local binary patterns, Ojala et al. 2002", _against("style", _texture),
    ),
    Measure(
        "grain", "difference of neighbouring grey levels from the style picture's", ("style",), "lower",
        "", (0.0, 1.0), "grey-level co-occurrence, Haralick et al. 1973", _against("style", _grain),
    ),
    Measure(
        "edges", "share of edges that lie where the subject picture's do", ("subject",), "higher",
        "", (0.0, 1.0), "boundary F-measure, Martin et al. 2004", _against("subject", _edges),
    ),
    Measure(
        "structure", "structural similarity to the subject picture, place by place", ("subject",), "higher",
        "", COSINE, "SSIM, Wang et al. 2004", _against("subject", _structure),
    ),
    Measure(
        "copied", "how far edges coincide with those of the likest training picture, laid over it", ("training",),
        "lower", "", (0.0, 1.0), "SIFT and ECC registration, boundary F-measure", _copied,
    ),
    Measure(
        "dino", "likeness to the subject picture", ("subject",), "higher",
        "", COSINE, "DINOv2, Oquab et al. 2023", _seen_by("dino", "subject"), "dino",
    ),
    Measure(
        "clip_i", "likeness to the subject picture", ("subject",), "higher",
        "", COSINE, "CLIP-I, Radford et al. 2021", _seen_by("clip", "subject"), "clip",
    ),
    Measure(
        "clip_style", "likeness to the style picture", ("style",), "higher",
        "", COSINE, "CLIP, Radford et al. 2021", _seen_by("clip", "style"), "clip",
    ),
    Measure(
        "clip_t", "how well the picture fits its prompt", ("prompt",), "higher",
        "", COSINE, "CLIP-T, Radford et al. 2021", _said, "clip",
    ),
    Measure(
        "csd", "likeness of style to the style picture", ("style",), "higher",
        "", COSINE, "CSD, Somepalli et al. 2024", _seen_by("csd", "style"), "csd",
    ),
    Measure(
        "lpips", "perceptual distance to the subject picture, place by place", ("subject",), "lower",
        "", (0.0, 1.5), "LPIPS, Zhang et al. 2018", _lpips, "lpips",
    ),
)  # fmt: skip
MEASURES: Mapping[str, Measure] = {row.name: row for row in _ROWS}
