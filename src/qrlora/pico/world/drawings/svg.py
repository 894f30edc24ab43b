"""SVG drawings as filled areas of one paint each: every shape rasterised with its rule, clip and stroke, then traced.

``svgelements`` resolves groups, transforms and ``use``; a raster of ``GRID`` samples a side makes strokes, clips,
even-odd and nonzero fills and overlapping contours one and the same: an area, with holes.
"""

from __future__ import annotations

import io
import xml.etree.ElementTree as ET
from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np
import svgelements as se

GRID = 768
"""Samples a side at which areas are traced."""
_BITS = 4
_XLINK = "{http://www.w3.org/1999/xlink}href"


@dataclass(frozen=True)
class Paint:
    """One colour, or a gradient from one to another.

    ends: (2, 4), red, green, blue and opacity in 0..255 at both ends. axis: (2, 2), where these lie, in drawing units;
    None: the same everywhere. radial: the first end is the centre of circles.
    """

    ends: np.ndarray
    axis: np.ndarray | None = None
    radial: bool = False

    @property
    def opacity(self) -> float:
        """Mean of both ends, in [0, 1]."""
        return float(self.ends[:, 3].mean()) / 255

    @property
    def mean(self) -> np.ndarray:
        """The colour of a part that can have only one: (3,), what is seen more counts more."""
        weight = self.ends[:, 3] + 1e-3
        return np.asarray((self.ends[:, :3] * weight[:, None]).sum(0) / weight.sum())


@dataclass(frozen=True)
class Area:
    """mask: (GRID, GRID) uint8, 1 inside. paint: what fills it."""

    mask: np.ndarray
    paint: Paint


def areas(body: str, width: float, height: float, faint: float = 0.45) -> list[Area]:
    """The areas of an SVG body, in painter's order, without shapes of less opacity than ``faint`` (shadows, gloss)."""
    text = (
        f'<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
        f'width="{width}" height="{height}" viewBox="0 0 {width} {height}">{body}</svg>'
    )
    text = text.replace(" clip-path=", " data-clip=")  # svgelements passes all attributes on to children but this one
    known = {e.attrib["id"]: e for e in ET.fromstring(text).iter() if "id" in e.attrib}
    scale, found = GRID / max(width, height), []
    for shape in _shapes(text):
        clip = _clip(shape, known, text, scale)
        for kind in ("fill", "stroke"):
            paint = _paint(shape, kind, known)
            if paint is None or paint.opacity < faint:
                continue
            mask = _filled(shape, scale) if kind == "fill" else _stroked(shape, scale)
            if clip is not None:
                mask = mask & clip
            if mask.any():
                found.append(Area(mask, paint))
    return found


def _shapes(text: str) -> list[se.Shape]:
    drawing = se.SVG.parse(io.StringIO(text), reify=True, ppi=96)
    return [e for e in drawing.elements() if isinstance(e, se.Shape) and not _hidden(e)]


def _hidden(shape: se.Shape) -> bool:
    return shape.values.get("display") == "none" or shape.values.get("visibility") == "hidden"


# ---------------------------------------------------------------- geometry


def _contours(shape: se.Shape, scale: float) -> list[np.ndarray]:
    """Each subpath as (n, 2) points in samples."""
    found = []
    for sub in se.Path(shape).as_subpaths():
        points: list[tuple[float, float]] = []
        for segment in sub:
            if isinstance(segment, se.Move):
                points.append((segment.end.x, segment.end.y))
            elif isinstance(segment, (se.Line, se.Close)):
                if segment.end is not None:
                    points.append((segment.end.x, segment.end.y))
            else:
                steps = int(np.clip(segment.length(error=1e-2, min_depth=2) * scale / 6, 4, 24))
                points += [tuple(p) for p in np.asarray(segment.npoint(np.linspace(0, 1, steps + 1)[1:]), float)]
        if len(points) > 1:
            found.append(np.array(points, float) * scale)
    return found


def _fixed(points: np.ndarray) -> np.ndarray:
    return np.round((points - 0.5) * 2**_BITS).astype(np.int32)


def _filled(shape: se.Shape, scale: float) -> np.ndarray:
    """The inside, by the shape's own rule: crossings counted, or turns (each contour by its direction)."""
    turns = np.zeros((GRID, GRID), np.int8)
    even_odd = shape.values.get("fill-rule") == "evenodd"
    for points in _contours(shape, scale):
        one = np.zeros((GRID, GRID), np.uint8)
        cv2.fillPoly(one, [_fixed(points)], 1, cv2.LINE_8, _BITS)
        turns += one.astype(np.int8) * (1 if even_odd or _signed_area(points) > 0 else -1)
    return (turns % 2 if even_odd else turns != 0).astype(np.uint8)


def _signed_area(points: np.ndarray) -> float:
    x, y = points.T
    return float(np.dot(x, np.roll(y, -1)) - np.dot(y, np.roll(x, -1)))


def _stroked(shape: se.Shape, scale: float) -> np.ndarray:
    """The line itself, ends and corners round."""
    mask = np.zeros((GRID, GRID), np.uint8)
    width = float(shape.stroke_width or 1.0)  # already by the transforms above it
    for points in _contours(shape, scale):
        cv2.polylines(mask, [_fixed(points)], False, 1, max(1, round(width * scale)), cv2.LINE_8, _BITS)
    return mask


def _clip(shape: se.Shape, known: dict[str, ET.Element], text: str, scale: float) -> np.ndarray | None:
    """The mask of the clip path that the shape or a group around it names, if any."""
    name = _reference(shape.values.get("data-clip"))
    if name not in known:
        return None
    inner = "".join(ET.tostring(child, encoding="unicode") for child in known[name])
    defs = "".join(
        ET.tostring(e, encoding="unicode") for e in known.values() if e.tag.endswith(("path", "symbol", "g"))
    )
    head = text[: text.index(">") + 1]
    mask = np.zeros((GRID, GRID), np.uint8)
    for part in _shapes(f"{head}<defs>{defs}</defs>{inner}</svg>"):
        mask |= _filled(part, scale)
    return mask


# ---------------------------------------------------------------- paint


def _reference(value: Any) -> str:
    text = str(value or "")
    return text[text.index("#") + 1 : text.rindex(")")].strip("'\"") if text.startswith("url(") else ""


def _number(value: Any, default: float = 1.0) -> float:
    text = str(default if value in (None, "") else value).strip()
    return float(text[:-1]) / 100 if text.endswith("%") else float(text)


def _paint(shape: se.Shape, kind: str, known: dict[str, ET.Element]) -> Paint | None:
    """The paint of a shape's fill or stroke; black where nothing says otherwise, as SVG has it."""
    raw = shape.values.get(kind)
    raw = ("black" if kind == "fill" else "none") if raw is None else str(raw).strip()
    opacity = _number(shape.values.get("opacity")) * _number(shape.values.get(f"{kind}-opacity"))
    if raw in ("none", "transparent"):
        return None
    if raw.startswith("url("):
        element = known.get(_reference(raw))
        return _gradient(element, known, shape, opacity) if element is not None else None
    colour = se.Color("black" if raw == "currentColor" else raw)
    if colour.value is None:
        return None
    ends = np.array([[colour.red, colour.green, colour.blue, colour.alpha * opacity]] * 2, float)
    return Paint(ends)


def _gradient(element: ET.Element, known: dict[str, ET.Element], shape: se.Shape, opacity: float) -> Paint | None:
    """A gradient as its two end colours and the axis between them; stops that cannot be seen count as little."""
    linked = known.get((element.get("href") or element.get(_XLINK) or "#").removeprefix("#"))
    stops = [e for e in element if e.tag.endswith("stop")]
    stops = stops or ([e for e in linked if e.tag.endswith("stop")] if linked is not None else [])
    if not stops:
        return None
    styles = [_styled(stop) for stop in stops]
    places = np.array([_number(s.get("offset"), 0.0) for s in styles])
    colours = np.array([_rgb(s.get("stop-color", "black")) for s in styles], float)
    alphas = np.array([_number(s.get("stop-opacity")) for s in styles])
    share = np.gradient(places).clip(1e-3) if len(places) > 1 else np.ones(1)
    ends = np.stack([_mean(colours, alphas, share * (w + 1e-3)) for w in (1 - places, places)])
    ends[:, 3] *= opacity
    return Paint(ends, _axis(element, shape), element.tag.endswith("radialGradient"))


def _mean(colours: np.ndarray, alphas: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Red, green, blue, opacity (0..255) of stops together; a colour counts as far as it is seen."""
    seen = weights * (alphas + 1e-3)
    colour = (colours * seen[:, None]).sum(0) / seen.sum()
    return np.array([*colour, 255 * (weights * alphas).sum() / weights.sum()])


def _styled(element: ET.Element) -> dict[str, str]:
    pairs = [p.split(":", 1) for p in (element.get("style") or "").split(";") if ":" in p]
    return {**element.attrib, **{k.strip(): v.strip() for k, v in pairs}}


def _rgb(text: str) -> tuple[float, float, float]:
    colour = se.Color(text)
    return (0.0, 0.0, 0.0) if colour.value is None else (colour.red, colour.green, colour.blue)


def _axis(element: ET.Element, shape: se.Shape) -> np.ndarray:
    """Return the way from the first stop to the last: (2, 2). A radial gradient is taken along its radius,
    downwards."""
    radial = element.tag.endswith("radialGradient")
    own = element.get("gradientUnits") != "userSpaceOnUse"
    if radial:
        cx, cy, r = (_number(element.get(k), 0.5) for k in ("cx", "cy", "r"))
        ends = [se.Point(cx, cy), se.Point(cx, cy + r)]
    else:
        x1, y1, x2, y2 = (_number(element.get(k), d) for k, d in (("x1", 0), ("y1", 0), ("x2", 1), ("y2", 0)))
        ends = [se.Point(x1, y1), se.Point(x2, y2)]
    matrix = se.Matrix(element.get("gradientTransform") or "")
    ends = [matrix.point_in_matrix_space(p) for p in ends]
    if own:
        x0, y0, x1, y1 = shape.bbox()
        ends = [se.Point(x0 + p.x * (x1 - x0), y0 + p.y * (y1 - y0)) for p in ends]
    return np.array([(p.x, p.y) for p in ends])
