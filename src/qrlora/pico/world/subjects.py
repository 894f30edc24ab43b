"""The subjects of the pico world: 28 things a company sells, each drawn as vector parts.

Every function takes a random generator and returns one drawing: the same thing each time, in slightly other
proportions. Drawings are deterministic given the generator and fill [-0.9, 0.9] in their larger dimension.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import numpy as np

from qrlora.pico.world.shapes import Part, arc, curve, ellipse, polygon, rect


def _fit(*parts: Part, size: float = 0.9) -> list[Part]:
    """The parts moved and scaled together so that the drawing, strokes included, is centred and fills [-size, size]."""
    low = np.min([p.points.min(0) - (p.width or 0) / 2 for p in parts], axis=0)
    high = np.max([p.points.max(0) + (p.width or 0) / 2 for p in parts], axis=0)
    scale, centre = 2 * size / (high - low).max(), (low + high) / 2
    return [Part((p.points - centre) * scale, p.tone, p.width and p.width * scale, p.closed) for p in parts]


def _flip(points: np.ndarray) -> np.ndarray:
    """The mirror image in the vertical axis."""
    return points * [-1.0, 1.0]


def _mirror(half: np.ndarray) -> np.ndarray:
    """A closed symmetric outline from its right half, given from top to bottom."""
    return np.concatenate([half, _flip(half)[::-1]])


def _band(top: float, bottom: float, y0: float, y1: float, sag: float) -> np.ndarray:
    """A band round a cylinder seen from slightly above: half widths top and bottom, from y0 to y1."""
    return np.concatenate([arc(0, y0, top, sag, 180, 0), arc(0, y1, bottom, sag, 0, 180)])


def _line(*points: tuple[float, float], tone: str = "dark", width: float = 0.08) -> Part:
    """A stroke through straight segments."""
    return Part(polygon(*points), tone, width)


def mug(rng: np.random.Generator) -> list[Part]:
    """A mug with a handle on the right and a stripe round it."""
    w, low, h = rng.uniform(0.52, 0.62), rng.uniform(0.84, 1.0), rng.uniform(0.58, 0.7)
    reach, y, band = rng.uniform(0.34, 0.46), rng.uniform(-0.1, 0.1), rng.uniform(0.18, 0.34)
    foot = w * low
    side = w - (w - foot) / 2
    return _fit(
        Part(arc(side - 0.04, 0.03, reach, h * 0.62, -90, 90), "main", 0.17),
        Part(_band(w, foot, -h, h, 0.15), "main"),
        Part(_band(side, side - 0.01, y, y + band, 0.15), "accent"),
        Part(ellipse(0, -h, w, 0.17), "light"),
        Part(ellipse(0, -h + 0.015, w - 0.09, 0.105), "dark"),
    )


def bottle(rng: np.random.Generator) -> list[Part]:
    """A drinks bottle with a cap and a paper label."""
    w, neck, shoulder = rng.uniform(0.33, 0.4), rng.uniform(0.12, 0.15), rng.uniform(-0.3, -0.15)
    cap, label = rng.uniform(0.15, 0.22), rng.uniform(0.42, 0.55)
    throat = [(neck, -0.8), (neck, shoulder - 0.32), (w * 0.72, shoulder - 0.1)]
    shape = curve(*throat, (w, shoulder + 0.12), (w, 0.82), (w - 0.08, 0.9))
    y = shoulder + 0.25
    return _fit(
        Part(_mirror(shape), "main"),
        Part(rect(-neck - 0.05, -0.8 - cap, 2 * neck + 0.1, cap, 0.04), "accent"),
        Part(rect(-neck - 0.03, -0.7, 2 * neck + 0.06, 0.08, 0.03), "dark"),
        Part(rect(-w, y, 2 * w, label), "light"),
        Part(rect(-w, y + label - 0.12, 2 * w, 0.12), "accent"),
        Part(ellipse(0, y + (label - 0.12) / 2, 0.12), "accent"),
    )


def lamp(rng: np.random.Generator) -> list[Part]:
    """A table lamp: a wide shade on a turned foot."""
    top, low, h = rng.uniform(0.28, 0.4), rng.uniform(0.62, 0.74), rng.uniform(0.72, 0.86)
    belly, y = rng.uniform(0.16, 0.26), -0.9 + h
    foot = curve((0.06, y), (0.06, y + 0.1), (belly, 0.42), (0.08, 0.76), (0.1, 0.84))
    slant = (low - top) / h
    rim = polygon((low - 0.1 * slant, y - 0.1), (low, y))
    return _fit(
        Part(ellipse(0, y + 0.01, 0.16, 0.14), "light"),
        Part(_mirror(foot), "accent"),
        Part(rect(-0.38, 0.8, 0.76, 0.14, 0.06), "dark"),
        _line((low * 0.6, y), (low * 0.6, y + 0.26), tone="metal", width=0.07),
        Part(ellipse(low * 0.6, y + 0.28, 0.07), "metal"),
        Part(_mirror(polygon((top, -0.9), (low, y))), "main"),
        Part(_mirror(polygon((top, -0.9), (top + 0.08 * slant, -0.82))), "accent"),
        Part(_mirror(rim), "accent"),
    )


def sneaker(rng: np.random.Generator) -> list[Part]:
    """A low trainer seen from the side, toe to the right."""
    top, sole, n = rng.uniform(-0.52, -0.42), rng.uniform(0.16, 0.22), int(rng.integers(2, 4))
    heel = [(-0.88, 0.3), (-0.92, 0.0), (-0.86, top + 0.06)]
    collar = [(-0.7, top + 0.16), (-0.45, top + 0.16), (-0.25, top - 0.06)]
    toe = [(0.1, -0.22), (0.38, -0.04), (0.7, 0.02), (0.9, 0.14), (0.94, 0.3)]
    laces = [(-0.13 + 0.15 * i, -0.4 + 0.11 * i) for i in range(3)]
    return _fit(
        Part(curve((-0.84, top + 0.12), (-0.6, top + 0.04), (-0.3, top - 0.04), (-0.2, 0.0), (-0.7, 0.0)), "dark"),
        Part(curve((-0.38, top + 0.1), (-0.3, top - 0.14), (-0.14, top - 0.12), (0.1, -0.2), (0.0, 0.0)), "light"),
        Part(curve(*heel, *collar, *toe), "main"),
        Part(curve((-0.88, 0.3), (-0.92, 0.0), (-0.88, top + 0.2), (-0.68, -0.06), (-0.58, 0.3)), "accent"),
        Part(curve((0.5, 0.32), (0.5, 0.12), (0.6, 0.01), (0.78, 0.05), (0.9, 0.14), (0.94, 0.32)), "light"),
        *(_line((x - 0.1, y + 0.22), (x + 0.05, y - 0.02), tone="light", width=0.075) for x, y in laces),
        *(_line((-0.42 + 0.2 * i, 0.28), (-0.26 + 0.2 * i, 0.0), tone="accent", width=0.1) for i in range(n)),
        Part(rect(-0.94, 0.28, 1.92, sole, 0.1), "light"),
        Part(rect(-0.94, 0.22 + sole, 1.9, 0.1, 0.05), "dark"),
    )


def chair(rng: np.random.Generator) -> list[Part]:
    """A dining chair from the front: padded back, padded seat, wooden legs."""
    w, back, seat = rng.uniform(0.44, 0.54), rng.uniform(0.5, 0.64), rng.uniform(0.02, 0.12)
    splay, r = rng.uniform(0.0, 0.1), rng.uniform(0.06, 0.24)
    top = -0.92
    front = w + 0.12
    cushion = curve((w - 0.06, seat), (w + 0.02, seat + 0.04), (front, seat + 0.2), (front - 0.04, seat + 0.28), n=6)
    return _fit(
        *(_line((s * w * 0.72, 0.3), (s * w * 0.72, 0.72), tone="dark", width=0.1) for s in (-1, 1)),
        *(_line((s * w * 0.7, seat + 0.1), (s * w * 0.7, top + 0.2), tone="accent", width=0.12) for s in (-1, 1)),
        *(_line((s * w, 0.3), (s * (w + splay), 0.92), tone="accent", width=0.13) for s in (-1, 1)),
        Part(rect(-w, top, 2 * w, back, r), "main"),
        Part(rect(-w + 0.04, seat + 0.24, 2 * w - 0.08, 0.16), "accent"),
        Part(_mirror(cushion), "main"),
        _line((-w * 0.5, top + back / 2), (w * 0.5, top + back / 2), tone="light", width=0.09),
    )


def watch(rng: np.random.Generator) -> list[Part]:
    """A wrist watch laid flat: strap above and below a metal case."""
    w, low, r = rng.uniform(0.3, 0.37), rng.uniform(0.72, 0.9), rng.uniform(0.5, 0.56)
    hour = np.radians(rng.choice([-60.0, -30.0, 30.0, 60.0]) - 90)
    minute = np.radians(rng.choice([-150.0, 120.0, 150.0]) - 90)
    tip, t = w * low, r - 0.2
    return _fit(
        Part(_mirror(polygon((tip, -0.94), (w, -0.3))), "main"),
        Part(_mirror(polygon((w, 0.3), (tip, 0.86), (tip - 0.1, 0.94))), "main"),
        Part(rect(-tip - 0.05, -0.98, 2 * tip + 0.1, 0.13, 0.04), "metal"),
        Part(rect(r - 0.05, -0.1, 0.17, 0.2, 0.04), "metal"),
        Part(ellipse(0, 0, r), "metal"),
        Part(ellipse(0, 0, r - 0.1), "light"),
        *(Part(ellipse(t * x, t * y, 0.07), "accent") for x, y in ((0, -1), (1, 0), (0, 1), (-1, 0))),
        _line((0, 0), (0.2 * np.cos(hour), 0.2 * np.sin(hour)), width=0.1),
        _line((0, 0), (0.3 * np.cos(minute), 0.3 * np.sin(minute)), width=0.075),
    )


def backpack(rng: np.random.Generator) -> list[Part]:
    """A backpack from the front: carrying loop, zipped body, big front pocket."""
    w, r, pocket = rng.uniform(0.52, 0.6), rng.uniform(0.36, 0.5), rng.uniform(0.46, 0.58)
    flap, side = rng.uniform(0.14, 0.2), rng.uniform(0.3, 0.42)
    body = np.concatenate([arc(w - r, -0.7 + r, r, r, -90, 0, 12), arc(w - 0.16, 0.74, 0.16, 0.16, 0, 90, 8)])
    return _fit(
        Part(arc(0, -0.7, 0.2, 0.22, 180, 360), "dark", 0.1),
        *(Part(rect(s * (w + 0.02) - 0.14, 0.74 - side, 0.28, side, 0.1), "dark") for s in (-1, 1)),
        Part(_mirror(body), "main"),
        Part(arc(0, -0.1, w - 0.15, 0.44, 195, 345), "dark", 0.07),
        Part(rect(-w + 0.12, 0.8 - pocket, 2 * w - 0.24, pocket, 0.12), "accent"),
        Part(rect(-w + 0.12, 0.8 - pocket, 2 * w - 0.24, flap, 0.07), "light"),
        Part(rect(-0.07, 0.8 - pocket + flap - 0.07, 0.14, 0.2, 0.04), "metal"),
    )


def headphones(rng: np.random.Generator) -> list[Part]:
    """Over-ear headphones from the front."""
    w, h, cup = rng.uniform(0.6, 0.68), rng.uniform(0.86, 1.0), rng.uniform(0.3, 0.36)
    thick = rng.uniform(0.13, 0.17)
    ears = []
    for s in (-1, 1):
        ears += [
            Part(rect(s * w - 0.08, 0.05 - cup, 0.16, 0.3, 0.04), "metal"),
            Part(rect(s * (w - 0.15) - 0.11, 0.32 - cup, 0.22, 2 * cup, 0.11), "dark"),
            Part(rect(s * (w + 0.06) - 0.17, 0.3 - cup, 0.34, 2 * cup + 0.04, 0.16), "main"),
            Part(rect(s * (w + 0.1) - 0.06, 0.32 - cup / 2, 0.12, cup, 0.06), "accent"),
        ]
    return _fit(
        Part(arc(0, 0.1, w, h, 180, 360), "main", thick),
        *ears,
    )


def camera(rng: np.random.Generator) -> list[Part]:
    """A photo camera from the front."""
    h, r, hump = rng.uniform(0.46, 0.54), rng.uniform(0.38, 0.44), rng.uniform(0.24, 0.34)
    band, button = rng.uniform(0.2, 0.26), rng.uniform(0.5, 0.62)
    corner = arc(0.74, 0.16 - h, 0.16, 0.16, -90, 0, 8)
    return _fit(
        Part(rect(button - 0.13, -h - 0.12, 0.26, 0.2, 0.05), "accent"),
        Part(rect(-0.72, -h - 0.07, 0.28, 0.14, 0.04), "dark"),
        Part(_mirror(polygon((hump, -h - 0.2), (hump + 0.1, -h + 0.1))), "metal"),
        Part(rect(-0.9, -h, 1.8, 2 * h, 0.16), "main"),
        Part(_mirror(np.concatenate([corner, polygon((0.9, band - h))])), "metal"),
        Part(rect(0.52, -h + 0.06, 0.26, 0.16, 0.04), "light"),
        Part(ellipse(0, 0.08, r), "metal"),
        Part(ellipse(0, 0.08, r - 0.08), "dark"),
        Part(ellipse(0, 0.08, r - 0.18), "glass"),
        Part(ellipse(-0.08, 0.0, 0.07), "light"),
        Part(rect(-0.82, 0.02, 0.24, h - 0.12, 0.08), "accent"),
    )


def guitar(rng: np.random.Generator) -> list[Part]:
    """An acoustic guitar standing on its body."""
    w, waist, y = rng.uniform(0.52, 0.6), rng.uniform(0.33, 0.38), rng.uniform(0.28, 0.34)
    hole, head = rng.uniform(0.12, 0.15), rng.uniform(0.12, 0.16)
    shoulder = [(0.0, -0.12), (0.22, -0.12), (w * 0.76, 0.06)]
    hips = [(waist, y), (w * 0.92, y + 0.2), (w, y + 0.38), (w * 0.78, y + 0.58), (0.2, y + 0.66), (0.0, y + 0.67)]
    return _fit(
        *(_line((-head - 0.1, v), (head + 0.1, v), tone="metal", width=0.08) for v in (-0.93, -0.78)),
        Part(_mirror(polygon((head, -1.02), (0.08, -0.66))), "accent"),
        Part(_mirror(curve(*shoulder, *hips)), "main"),
        Part(curve((0.06, 0.3), (0.2, 0.28), (0.28, 0.42), (0.2, 0.54), (0.06, 0.5), closed=True), "accent"),
        Part(ellipse(0, y - 0.04, hole + 0.06), "light"),
        Part(ellipse(0, y - 0.04, hole), "dark"),
        Part(rect(-0.08, -0.7, 0.16, y + 0.54, 0.02), "dark"),
        *(_line((-0.08, v), (0.08, v), tone="metal", width=0.08) for v in (-0.5, -0.28, -0.06)),
        Part(rect(-0.2, y + 0.33, 0.4, 0.1, 0.04), "dark"),
    )


def book(rng: np.random.Generator) -> list[Part]:
    """A closed hardback seen from the front, its page edges showing above and to the right."""
    w, h, d = rng.uniform(1.0, 1.16), rng.uniform(1.4, 1.55), rng.uniform(0.18, 0.26)
    spine, title, r = rng.uniform(0.16, 0.22), rng.uniform(0.5, 0.62), rng.uniform(0.17, 0.22)
    up, mid, flag = d * 0.8, spine + (w - spine) / 2, w * 0.8
    back = polygon((0, 0), (d, -up), (w + d, -up), (w + d, h - up), (w, h))
    right, top = w + d - 0.09, 0.09 - up
    pages = polygon((0.06, 0), (d, top), (right, top), (right, h - up - 0.04), (w, h - 0.06), (w, 0))
    lines = [(title / 2, h * 0.2), (title * 0.35, h * 0.2 + 0.18)]
    return _fit(
        Part(back, "main"),
        Part(pages, "light"),
        Part(
            polygon((flag, h), (flag + 0.14, h), (flag + 0.14, h + 0.2), (flag + 0.07, h + 0.12), (flag, h + 0.2)),
            "dark",
        ),
        Part(rect(0, 0, w, h, 0.04), "main"),
        Part(rect(0, 0, spine, h, 0.04), "accent"),
        *(_line((mid - t, y), (mid + t, y), tone="light", width=0.1) for t, y in lines),
        Part(ellipse(mid, h * 0.66, r), "accent"),
    )


def umbrella(rng: np.random.Generator) -> list[Part]:
    """An open umbrella with a scalloped edge and a hooked handle."""
    h, hook, n = rng.uniform(0.78, 0.92), rng.uniform(0.14, 0.18), int(rng.choice([4, 5]))
    spans = list(pairwise(np.linspace(-0.92, 0.92, n + 1)))
    scallops = [arc((a + b) / 2, 0.05, (b - a) / 2, 0.12, 180, 360, 12) for a, b in spans]
    panels = []
    for (a, b), edge in list(zip(spans, scallops, strict=True))[1 - n % 2 :: 2]:
        left, right = (arc(0, 0.05, abs(x), h, 270, 360 if x > 0 else 180, 16) for x in (a, b))
        panels.append(Part(np.concatenate([left, edge, right[::-1]]), "accent"))
    return _fit(
        _line((0, -h), (0, 0.8), tone="metal", width=0.09),
        Part(np.concatenate([polygon((0, 0.45)), arc(-hook, 0.8, hook, hook, 0, 180)]), "dark", 0.14),
        _line((0, 0.1 - h), (0, -0.1 - h), tone="dark", width=0.1),
        Part(np.concatenate([arc(0, 0.05, 0.92, h, 180, 360), np.concatenate(scallops)[::-1]]), "main"),
        *panels,
    )


def hat(rng: np.random.Generator) -> list[Part]:
    """A felt hat with a pinched crown, a ribbon, a feather and a wide brim."""
    w, h, dip = rng.uniform(0.46, 0.54), rng.uniform(0.66, 0.8), rng.uniform(0.06, 0.12)
    band, low = rng.uniform(0.17, 0.24), rng.uniform(0.16, 0.2)
    crown = curve((0, dip - h), (0.14, -h), (w * 0.62, 0.02 - h), (w * 0.84, 0.16 - h), (w * 0.92, 0.5 - h), (w, 0.12))
    rise = [(0, 0.06), (0.4, 0.1), (0.7, 0.06), (0.88, -0.04)]
    fall = [(0.95, 0.02), (0.8, 0.06 + low), (0.4, 0.16 + low), (0, 0.18 + low)]
    feather, _ = _leaf(w * 0.5, 0.06, rng.uniform(4, 16), 0.6, 0.12)
    return _fit(
        Part(_mirror(curve(*rise, *fall)), "main"),
        Part(_mirror(crown), "main"),
        Part(feather.points, "light"),
        Part(_band(w * 0.96, w + 0.03, 0.08 - band, 0.1, 0.08), "accent"),
    )


def phone(rng: np.random.Generator) -> list[Part]:
    """A smartphone from the front, two columns of icons on its screen."""
    w, r, rows = rng.uniform(0.46, 0.54), rng.uniform(0.12, 0.2), int(rng.integers(2, 4))
    dock, step, start = rng.uniform(0.2, 0.28), rng.uniform(0.31, 0.35), int(rng.integers(3))
    icons = [(column, row) for row in range(rows) for column in range(2)]
    tones = [("accent", "light", "main")[(start + column + row) % 3] for column, row in icons]
    spots = [rect((c - 0.5) * step - 0.125, -0.57 + i * (step - 0.01), 0.25, 0.25, 0.06) for c, i in icons]
    return _fit(
        Part(rect(w - 0.03, -0.45, 0.09, 0.28, 0.03), "dark"),
        Part(rect(-w, -0.9, 2 * w, 1.8, r), "main"),
        Part(rect(-w + 0.12, -0.76, 2 * w - 0.24, 1.52, r * 0.5), "dark"),
        Part(rect(-0.15, -0.8, 0.3, 0.12, 0.05), "main"),
        *(Part(spot, tone) for spot, tone in zip(spots, tones, strict=True)),
        Part(rect(-w + 0.19, 0.69 - dock, 2 * w - 0.38, dock, 0.08), "glass"),
    )


def sofa(rng: np.random.Generator) -> list[Part]:
    """A two-seat sofa with round arms, a throw pillow and short legs."""
    h, arm, r = rng.uniform(0.54, 0.66), rng.uniform(0.24, 0.3), rng.uniform(0.1, 0.2)
    side, tilt = rng.choice([-1.0, 1.0]), rng.uniform(0.02, 0.08)
    inner = 0.92 - arm
    pillow = polygon((-0.16, -0.26), (0.18, -0.26 + tilt), (0.18, 0.14), (-0.18, 0.14)) + [inner - 0.2, 0]
    return _fit(
        *(_line((s * 0.72, 0.42), (s * 0.76, 0.64), tone="dark", width=0.12) for s in (-1, 1)),
        Part(rect(-0.78, -h, 1.56, 0.9, r), "main"),
        _line((0, 0.12 - h), (0, 0.1), width=0.07),
        Part(pillow * [side, 1], "accent"),
        Part(rect(-inner, 0.2, 2 * inner, 0.2), "dark"),
        *(Part(rect(x, 0.06, inner - 0.02, 0.25, 0.08), "light") for x in (-inner, 0.02)),
        Part(rect(-0.8, 0.34, 1.6, 0.18, 0.04), "main"),
        *(Part(rect(s * (0.92 - arm / 2) - arm / 2, -0.16, arm, 0.68, arm / 2), "main") for s in (-1, 1)),
    )


def handbag(rng: np.random.Generator) -> list[Part]:
    """A handbag with one arched handle, a flap and a clasp."""
    top, low, y = rng.uniform(0.54, 0.62), rng.uniform(0.74, 0.84), rng.uniform(-0.24, -0.12)
    reach, flap = rng.uniform(0.52, 0.62), rng.uniform(0.34, 0.44)
    body = np.concatenate([polygon((top, y)), arc(low - 0.14, 0.66, 0.14, 0.14, 0, 90, 8)])
    edge = curve((top + 0.03, y - 0.02), (top + 0.06, y + flap * 0.6), (top - 0.14, y + flap), (0, y + flap + 0.06))
    return _fit(
        Part(arc(0, y, 0.36, reach, 180, 360), "dark", 0.12),
        Part(_mirror(body), "main"),
        Part(rect(-low + 0.02, 0.66, 2 * low - 0.04, 0.14, 0.07), "dark"),
        Part(_mirror(edge), "accent"),
        *(Part(ellipse(s * 0.36, y + 0.06, 0.08), "metal") for s in (-1, 1)),
        Part(rect(-0.11, y + flap - 0.07, 0.22, 0.22, 0.05), "metal"),
    )


def candle(rng: np.random.Generator) -> list[Part]:
    """A lit candle with running wax in a saucer holder."""
    w, h, flame = rng.uniform(0.28, 0.34), rng.uniform(0.72, 0.86), rng.uniform(0.4, 0.46)
    dish, drip = rng.uniform(0.54, 0.62), rng.uniform(0.22, 0.36)
    top = 0.66 - h
    tip = top - 0.1 - flame
    fire = curve((0, tip), (0.1, tip + 0.16), (0.17, tip + 0.3), (0.11, tip + flame), (0, tip + flame + 0.04))
    left = [(-w, top), (-w * 0.9, top + 0.16), (-w * 0.4, top + 0.12), (-w * 0.1, top + drip)]
    right = [(w * 0.25, top + 0.14), (w * 0.6, top + 0.12), (w * 0.8, top + drip * 0.8), (w, top + 0.1), (w, top)]
    return _fit(
        Part(ellipse(dish + 0.1, 0.68, 0.14), "metal", 0.1, True),
        Part(_mirror(curve((dish, 0.6), (dish - 0.04, 0.74), (dish * 0.6, 0.86), (0, 0.88), n=8)), "metal"),
        Part(_band(w, w, top, 0.64, 0.06), "main"),
        Part(curve(*left, *right), "light"),
        Part(ellipse(0, top, w, 0.08), "light"),
        _line((0, top), (0, top - 0.14), width=0.08),
        Part(_mirror(fire), "accent"),
        Part(_mirror(fire * [0.5, 0.5] + [0, (top - 0.08) * 0.5]), "light"),
    )


def _leaf(x: float, y: float, angle: float, length: float, width: float) -> tuple[Part, Part]:
    """A pointed leaf growing from (x, y), angle degrees clockwise from upright, and its midrib."""
    a = np.radians(angle)
    turn = np.array([[np.cos(a), np.sin(a)], [-np.sin(a), np.cos(a)]])
    tip = [(0, -length), (width * 0.7, -length * 0.72), (width, -length * 0.45)]
    half = curve(*tip, (width * 0.55, -length * 0.12), (0, 0))
    rib = polygon((0, -0.05), (0, -length * 0.7))
    return Part(_mirror(half) @ turn + [x, y], "main"), Part(rib @ turn + [x, y], "light", 0.07)


def plant(rng: np.random.Generator) -> list[Part]:
    """A leafy house plant in a pot."""
    w, low, h = rng.uniform(0.38, 0.46), rng.uniform(0.66, 0.8), rng.uniform(0.44, 0.52)
    spread, size = rng.uniform(0.92, 1.08), rng.uniform(0.19, 0.23)
    y = 0.9 - h
    shape = [(-74, 0.72), (74, 0.72), (-38, 0.98), (38, 0.98), (0, 1.1)]
    leaves = [
        _leaf(0.08 * np.sign(a), y - 0.02, a * spread, length * rng.uniform(0.92, 1.06), size) for a, length in shape
    ]
    return _fit(
        *(part for leaf in leaves for part in leaf),
        Part(_mirror(polygon((w, y), (w * low, 0.9))), "accent"),
        Part(rect(-w - 0.07, y - 0.06, 2 * w + 0.14, 0.18, 0.04), "dark"),
    )


def clock(rng: np.random.Generator) -> list[Part]:
    """A twin-bell alarm clock."""
    r, bell, rim = rng.uniform(0.64, 0.7), rng.uniform(0.22, 0.28), rng.uniform(0.16, 0.2)
    hour = np.radians(rng.choice([-60.0, -30.0, 30.0, 60.0]) - 90)
    minute = np.radians(rng.choice([-90.0, 90.0, 120.0]) - 90)
    tick = r - rim - 0.12
    turn = np.array([[np.cos(0.7), np.sin(0.7)], [-np.sin(0.7), np.cos(0.7)]])
    dome = arc(0, 0, bell * 1.15, bell, 180, 360) @ turn + [0.62 * r + 0.1, -0.72 * r - 0.06]
    return _fit(
        *(_line((s * 0.34, 0.5), (s * 0.56, 0.86), tone="dark", width=0.13) for s in (-1, 1)),
        _line((0, -r + 0.1), (0, -r - 0.16), tone="dark", width=0.09),
        Part(rect(-0.1, -r - 0.24, 0.2, 0.12, 0.04), "dark"),
        Part(dome, "accent"),
        Part(_flip(dome), "accent"),
        Part(ellipse(0, 0, r), "main"),
        Part(ellipse(0, 0, r - rim), "light"),
        *(Part(ellipse(tick * x, tick * y, 0.05), "accent") for x, y in ((0, -1), (1, 0), (0, 1), (-1, 0))),
        _line((0, 0), (0.26 * np.cos(hour), 0.26 * np.sin(hour)), width=0.1),
        _line((0, 0), (0.38 * np.cos(minute), 0.38 * np.sin(minute)), width=0.07),
    )


def glasses(rng: np.random.Generator) -> list[Part]:
    """Spectacles from the front, thick frames and pale lenses."""
    h, taper, frame = rng.uniform(0.3, 0.38), rng.uniform(0.8, 1.0), rng.uniform(0.1, 0.14)
    top = [(0.18, -h * 0.75), (0.5, -h), (0.83, -h * 0.75)]
    lens = curve(*top, (0.08 + 0.77 * taper, h * 0.45), (0.48, h), (0.22, h * 0.5), closed=True)
    outer = (lens - [0.5, 0]) * [1 + frame / 0.34, 1 + frame / h] + [0.5, 0]
    glint = polygon((0.4, h * 0.35), (0.6, -h * 0.5))
    hinge = rect(0.84, -h * 0.85, 0.2, 0.2, 0.05)
    return _fit(
        Part(arc(0, -0.06, 0.16, 0.16, 180, 360), "main", 0.12),
        *(Part(p, "accent") for p in (hinge, _flip(hinge))),
        *(Part(p, "main") for p in (outer, _flip(outer))),
        *(Part(p, "glass") for p in (lens, _flip(lens))),
        *(Part(glint - [x, 0], "light", 0.1) for x in (0, 0.98)),
    )


def car(rng: np.random.Generator) -> list[Part]:
    """A small car from the side, driving to the right."""
    roof, r, belt = rng.uniform(-0.62, -0.52), rng.uniform(0.21, 0.25), rng.uniform(-0.1, -0.04)
    nose, rear = rng.uniform(-0.04, 0.04), rng.uniform(-0.52, -0.44)
    back = [(-0.92, 0.3), (-0.94, 0.1), (-0.86, belt - 0.02), (-0.7, belt - 0.1), (rear, roof + 0.06), (-0.2, roof)]
    front = [(0.16, roof + 0.02), (0.42, belt - 0.1), (0.7, nose - 0.04), (0.9, nose + 0.1), (0.95, 0.3)]
    windows = [
        polygon((-0.6, belt), (rear + 0.06, roof + 0.12), (-0.11, roof + 0.1), (-0.11, belt)),
        polygon((0.0, belt), (0.0, roof + 0.1), (0.13, roof + 0.12), (0.35, belt)),
    ]
    return _fit(
        Part(np.concatenate([curve(*back, *front), polygon((0.95, 0.36), (-0.92, 0.36))]), "main"),
        *(Part(window, "glass") for window in windows),
        Part(rect(-0.94, 0.29, 1.9, 0.12, 0.05), "dark"),
        _line((-0.86, 0.11), (0.72, 0.11), tone="accent", width=0.1),
        Part(ellipse(0.82, nose + 0.14, 0.1, 0.09), "light"),
        *(Part(ellipse(x, 0.36, q), t) for x in (-0.52, 0.54) for q, t in ((r, "dark"), (r * 0.52, "metal"))),
    )


def shirt(rng: np.random.Generator) -> list[Part]:
    """A T-shirt laid flat, with a printed chest."""
    w, sleeve, hem = rng.uniform(0.46, 0.52), rng.uniform(0.0, 0.12), rng.uniform(0.78, 0.88)
    neck, n = rng.uniform(0.18, 0.23), int(rng.integers(1, 4))
    outer, inner = np.array([0.94, -0.18 + sleeve]), np.array([0.72, 0.04 + sleeve])
    half = polygon((neck, -0.8), (0.46, -0.72), tuple(outer), tuple(inner), (w, -0.2), (w, hem))
    slope = (outer - [0.46, -0.72]) * 0.14
    cuff = np.array([outer, inner, inner - slope * 1.1, outer - slope])
    rows = [-0.12 + 0.19 * i for i in range(n)]
    return _fit(
        Part(_mirror(half), "main"),
        Part(cuff, "accent"),
        Part(_flip(cuff), "accent"),
        *(Part(rect(-w, y, 2 * w, 0.1), "accent") for y in rows),
        Part(arc(0, -0.8, neck, 0.22, 0, 180), "dark"),
        Part(arc(0, -0.8, neck + 0.02, 0.23, 0, 180), "light", 0.08),
    )


def teapot(rng: np.random.Generator) -> list[Part]:
    """A round teapot: spout to the left, handle to the right, lid with a knob."""
    w, h, band = rng.uniform(0.52, 0.58), rng.uniform(0.46, 0.54), rng.uniform(0.12, 0.18)
    lid, handle = rng.uniform(0.28, 0.34), rng.uniform(0.26, 0.32)
    under = curve((-w + 0.1, 0.34), (-w - 0.16, 0.16), (-w - 0.26, -0.2), (-w - 0.42, -0.36))
    over = curve((-w - 0.2, -0.42), (-w - 0.08, -0.2), (-w + 0.12, -0.08), (-w + 0.2, 0.34))
    return _fit(
        Part(arc(w - 0.06, -0.02, handle, 0.32, -100, 100), "main", 0.14),
        Part(np.concatenate([under, over]), "main"),
        Part(rect(-0.3, h - 0.08, 0.6, 0.16, 0.05), "dark"),
        Part(ellipse(0, 0, w, h), "main"),
        Part(_band(w * 0.96, w * 0.96, 0.0, band, 0.1), "accent"),
        Part(ellipse(0, -h - 0.12, 0.1), "dark"),
        Part(arc(0, -h * 0.78, lid, h * 0.42, 180, 360), "accent"),
        Part(rect(-lid - 0.05, -h * 0.8, 2 * lid + 0.1, 0.09, 0.04), "dark"),
    )


def rocket(rng: np.random.Generator) -> list[Part]:
    """A toy rocket taking off: nose cone, porthole, fins and flame."""
    w, nose, hole = rng.uniform(0.33, 0.39), rng.uniform(-0.48, -0.4), rng.uniform(0.16, 0.19)
    fin, flame = rng.uniform(0.28, 0.36), rng.uniform(0.4, 0.5)
    hull = curve((0, -0.95), (w * 0.55, -0.68), (w * 0.94, -0.3), (w, 0.0), (w * 0.88, 0.28), (w * 0.6, 0.5))
    wing = np.concatenate([curve((w * 0.9, 0.04), (w + fin * 0.8, 0.24), (w + fin, 0.66)), polygon((w * 0.7, 0.46))])
    fire = curve((0.24, 0.5), (0.29, 0.7), (0.13, 0.5 + flame * 0.8), (0, 0.55 + flame), n=8)
    return _fit(
        Part(_mirror(fire), "accent"),
        Part(_mirror((fire - [0, 0.5]) * [0.5, 0.6] + [0, 0.5]), "light"),
        *(Part(p, "accent") for p in (wing, _flip(wing))),
        Part(rect(-0.25, 0.46, 0.5, 0.14, 0.03), "dark"),
        Part(_mirror(hull), "main"),
        Part(_mirror(hull[hull[:, 1] < nose]), "accent"),
        Part(ellipse(0, -0.12, hole + 0.08), "metal"),
        Part(ellipse(0, -0.12, hole), "glass"),
        Part(rect(-0.07, 0.22, 0.14, 0.42, 0.05), "accent"),
    )


def robot(rng: np.random.Generator) -> list[Part]:
    """A toy robot: box head with an aerial, box body, tube arms and legs."""
    head, body, eye = rng.uniform(0.4, 0.48), rng.uniform(0.4, 0.48), rng.uniform(0.12, 0.14)
    r, x, hand = rng.uniform(0.05, 0.14), rng.uniform(0.18, 0.21), body + 0.18
    parts = []
    for s in (-1, 1):
        arm = ((s * (body - 0.05), -0.06), (s * hand, 0.06), (s * hand, 0.3))
        parts += [_line(*arm, tone="metal", width=0.14), Part(ellipse(s * hand, 0.36, 0.13), "accent")]
        parts += [_line((s * 0.2, 0.5), (s * 0.2, 0.84), tone="metal", width=0.16)]
        parts += [Part(rect(s * 0.23 - 0.18, 0.78, 0.36, 0.17, 0.06), "accent")]
    return _fit(
        *parts,
        _line((0, -0.7), (0, -0.9), tone="metal", width=0.09),
        Part(ellipse(0, -0.94, 0.1), "accent"),
        _line((-head - 0.08, -0.5), (head + 0.08, -0.5), tone="accent", width=0.2),
        Part(rect(-0.12, -0.3, 0.24, 0.2), "metal"),
        Part(rect(-head, -0.8, 2 * head, 0.58, r), "main"),
        *(Part(ellipse(s * x, -0.57, q), t) for q, t in ((eye, "light"), (0.06, "dark")) for s in (-1, 1)),
        _line((-0.19, -0.34), (0.19, -0.34), width=0.09),
        Part(rect(-body, -0.16, 2 * body, 0.72, r), "main"),
        Part(rect(-body + 0.12, -0.04, 2 * body - 0.24, 0.34, 0.05), "light"),
        *(Part(ellipse(c, 0.13, 0.08), t) for c, t in ((-0.15, "accent"), (0.15, "dark"))),
    )


def boot(rng: np.random.Generator) -> list[Part]:
    """A tall rain boot from the side, toe to the right."""
    w, toe, sole = rng.uniform(0.3, 0.36), rng.uniform(0.7, 0.82), rng.uniform(0.12, 0.15)
    cuff, heel = rng.uniform(0.18, 0.25), rng.uniform(0.1, 0.14)
    ankle = [(w - 0.02, -0.9), (w - 0.06, -0.3), (w - 0.02, 0.1), (toe * 0.72, 0.24), (toe, 0.44), (toe + 0.02, 0.68)]
    back = curve((-w, 0.68), (-w - 0.02, 0.4), (-w + 0.04, 0.1), (-w - 0.04, -0.4), (-w - 0.06, -0.9))
    cap = [(toe * 0.58, 0.7), (toe * 0.55, 0.44), (toe * 0.72, 0.25), (toe * 0.92, 0.36), (toe + 0.01, 0.5)]
    base, end = 0.66 + sole, toe + 0.08
    under = [(end, 0.66), (end - 0.06, base), (0.16, base), (0.1, base + heel), (-w - 0.06, base + heel)]
    return _fit(
        Part(np.concatenate([curve(*ankle, n=10), back]), "main"),
        Part(curve(*cap, (toe + 0.02, 0.7)), "accent"),
        Part(rect(-w - 0.12, -0.92, 2 * w + 0.16, cuff, 0.05), "accent"),
        _line((-w + 0.08, 0.4), (w * 0.6, 0.4), tone="light", width=0.11),
        Part(polygon((-w - 0.06, 0.64), (end, 0.64), *under), "dark"),
    )


def cupcake(rng: np.random.Generator) -> list[Part]:
    """A cupcake: pleated paper case, three swirls of icing, a cherry."""
    w, low, h = rng.uniform(0.56, 0.64), rng.uniform(0.68, 0.78), rng.uniform(0.17, 0.2)
    y, cherry, n = rng.uniform(0.1, 0.18), rng.uniform(0.13, 0.16), 4
    pleats = [-0.75 + 1.5 * i / (n - 1) for i in range(n)]
    swirls = [(w + 0.16, y), (w - 0.06, y - 1.35 * h), (w * 0.52, y - 2.7 * h)]
    return _fit(
        Part(_mirror(polygon((w, y), (w * low, 0.9))), "accent"),
        *(_line((w * q, y + 0.1), (w * low * q, 0.87), tone="light", width=0.08) for q in pleats),
        Part(arc(0.06, y - 3.4 * h - cherry * 1.4, 0.14, 0.3, 180, 250), "dark", 0.09),
        Part(ellipse(0, y - 3.5 * h - cherry * 0.5, cherry), "accent"),
        *(Part(rect(-a, b - h, 2 * a, 2 * h, h), "main") for a, b in swirls[::-1]),
        *(Part(arc(0, b - h * 0.4, a * 0.75, h * 0.8, 40, 140), "light", 0.08) for a, b in swirls[:2]),
    )


def trophy(rng: np.random.Generator) -> list[Part]:
    """A winner's cup with two handles on a dark plinth."""
    w, h, base = rng.uniform(0.44, 0.52), rng.uniform(0.14, 0.24), rng.uniform(0.36, 0.44)
    grip, r = rng.uniform(0.2, 0.26), rng.uniform(0.16, 0.19)
    bowl = [(w, -0.85), (w * 0.98, -0.5), (w * 0.78, h - 0.3), (0.3, h - 0.02)]
    cup = curve(*bowl, (0.09, h + 0.12), (0.09, 0.4), (0.26, 0.58))
    a = np.radians(np.arange(10) * 36 - 90)
    star = np.stack([np.cos(a), np.sin(a)], 1) * np.where(np.arange(10) % 2, r * 0.45, r)[:, None]
    handle = curve((w - 0.04, -0.7), (w + grip, -0.7), (w + grip, -0.36), (w * 0.72, -0.02))
    return _fit(
        Part(handle, "main", 0.11),
        Part(_flip(handle), "main", 0.11),
        Part(_mirror(cup), "main"),
        Part(rect(-w - 0.07, -0.92, 2 * w + 0.14, 0.14, 0.06), "accent"),
        Part(star + [0, -0.38], "light"),
        Part(rect(-base + 0.08, 0.54, 2 * base - 0.16, 0.12, 0.03), "accent"),
        Part(rect(-base, 0.64, 2 * base, 0.28, 0.04), "dark"),
        Part(rect(-0.2, 0.72, 0.4, 0.12, 0.02), "metal"),
    )


Subject = Callable[[np.random.Generator], list[Part]]

_SEEN: list[Subject] = [mug, bottle, lamp, sneaker, chair, watch, backpack, headphones, camera, guitar, book]
_SEEN += [umbrella, hat, phone, sofa, handbag, candle, plant, clock, glasses, car, shirt]
_RESERVED: list[Subject] = [teapot, rocket, robot, boot, cupcake, trophy]

SUBJECTS: dict[str, Subject] = {f.__name__: f for f in (*_SEEN, *_RESERVED)}
"""Every subject by its name in captions, the seen ones first."""

SEEN_SUBJECTS: tuple[str, ...] = tuple(f.__name__ for f in _SEEN)
"""The subjects the pico base model is trained on."""

RESERVED_SUBJECTS: tuple[str, ...] = tuple(f.__name__ for f in _RESERVED)
"""The subjects kept from the pico base model, for adapters to learn."""
