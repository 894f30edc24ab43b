"""Things that people wear and carry, drawn as vector parts."""

from __future__ import annotations

from itertools import pairwise

import numpy as np

from qrlora.pico.world.shapes import (
    Part,
    arc,
    curve,
    ellipse,
    fit,
    flip,
    hoop,
    mirror,
    pointed_leaf,
    polygon,
    rect,
    stroke,
)


def sneaker(rng: np.random.Generator) -> list[Part]:
    """A low trainer seen from the side, toe to the right."""
    top, sole, n = rng.uniform(-0.52, -0.42), rng.uniform(0.16, 0.22), int(rng.integers(2, 4))
    heel = [(-0.88, 0.3), (-0.92, 0.0), (-0.86, top + 0.06)]
    collar = [(-0.7, top + 0.16), (-0.45, top + 0.16), (-0.25, top - 0.06)]
    toe = [(0.1, -0.22), (0.38, -0.04), (0.7, 0.02), (0.9, 0.14), (0.94, 0.3)]
    laces = [(-0.13 + 0.15 * i, -0.4 + 0.11 * i) for i in range(3)]
    return fit(
        Part(curve((-0.84, top + 0.12), (-0.6, top + 0.04), (-0.3, top - 0.04), (-0.2, 0.0), (-0.7, 0.0)), "dark"),
        Part(curve((-0.38, top + 0.1), (-0.3, top - 0.14), (-0.14, top - 0.12), (0.1, -0.2), (0.0, 0.0)), "light"),
        Part(curve(*heel, *collar, *toe), "main"),
        Part(curve((-0.88, 0.3), (-0.92, 0.0), (-0.88, top + 0.2), (-0.68, -0.06), (-0.58, 0.3)), "accent"),
        Part(curve((0.5, 0.32), (0.5, 0.12), (0.6, 0.01), (0.78, 0.05), (0.9, 0.14), (0.94, 0.32)), "light"),
        *(stroke((x - 0.1, y + 0.22), (x + 0.05, y - 0.02), tone="light", width=0.075) for x, y in laces),
        *(stroke((-0.42 + 0.2 * i, 0.28), (-0.26 + 0.2 * i, 0.0), tone="accent", width=0.1) for i in range(n)),
        Part(rect(-0.94, 0.28, 1.92, sole, 0.1), "light"),
        Part(rect(-0.94, 0.22 + sole, 1.9, 0.1, 0.05), "dark"),
    )


def watch(rng: np.random.Generator) -> list[Part]:
    """A wrist watch laid flat: strap above and below a metal case."""
    w, low, r = rng.uniform(0.3, 0.37), rng.uniform(0.72, 0.9), rng.uniform(0.5, 0.56)
    hour = np.radians(rng.choice([-60.0, -30.0, 30.0, 60.0]) - 90)
    minute = np.radians(rng.choice([-150.0, 120.0, 150.0]) - 90)
    tip, t = w * low, r - 0.2
    return fit(
        Part(mirror(polygon((tip, -0.94), (w, -0.3))), "main"),
        Part(mirror(polygon((w, 0.3), (tip, 0.86), (tip - 0.1, 0.94))), "main"),
        Part(rect(-tip - 0.05, -0.98, 2 * tip + 0.1, 0.13, 0.04), "metal"),
        Part(rect(r - 0.05, -0.1, 0.17, 0.2, 0.04), "metal"),
        Part(ellipse(0, 0, r), "metal"),
        Part(ellipse(0, 0, r - 0.1), "light"),
        *(Part(ellipse(t * x, t * y, 0.07), "accent") for x, y in ((0, -1), (1, 0), (0, 1), (-1, 0))),
        stroke((0, 0), (0.2 * np.cos(hour), 0.2 * np.sin(hour)), width=0.1),
        stroke((0, 0), (0.3 * np.cos(minute), 0.3 * np.sin(minute)), width=0.075),
    )


def backpack(rng: np.random.Generator) -> list[Part]:
    """A backpack from the front: carrying loop, zipped body, big front pocket."""
    w, r, pocket = rng.uniform(0.52, 0.6), rng.uniform(0.36, 0.5), rng.uniform(0.46, 0.58)
    flap, side = rng.uniform(0.14, 0.2), rng.uniform(0.3, 0.42)
    body = np.concatenate([arc(w - r, -0.7 + r, r, r, -90, 0, 12), arc(w - 0.16, 0.74, 0.16, 0.16, 0, 90, 8)])
    return fit(
        Part(arc(0, -0.7, 0.2, 0.22, 180, 360), "dark", 0.1),
        *(Part(rect(s * (w + 0.02) - 0.14, 0.74 - side, 0.28, side, 0.1), "dark") for s in (-1, 1)),
        Part(mirror(body), "main"),
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
    return fit(
        Part(arc(0, 0.1, w, h, 180, 360), "main", thick),
        *ears,
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
    return fit(
        stroke((0, -h), (0, 0.8), tone="metal", width=0.09),
        Part(np.concatenate([polygon((0, 0.45)), arc(-hook, 0.8, hook, hook, 0, 180)]), "dark", 0.14),
        stroke((0, 0.1 - h), (0, -0.1 - h), tone="dark", width=0.1),
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
    feather, _ = pointed_leaf(w * 0.5, 0.06, rng.uniform(4, 16), 0.6, 0.12)
    return fit(
        Part(mirror(curve(*rise, *fall)), "main"),
        Part(mirror(crown), "main"),
        Part(feather.points, "light"),
        Part(hoop(w * 0.96, w + 0.03, 0.08 - band, 0.1, 0.08), "accent"),
    )


def handbag(rng: np.random.Generator) -> list[Part]:
    """A handbag with one arched handle, a flap and a clasp."""
    top, low, y = rng.uniform(0.54, 0.62), rng.uniform(0.74, 0.84), rng.uniform(-0.24, -0.12)
    reach, flap = rng.uniform(0.52, 0.62), rng.uniform(0.34, 0.44)
    body = np.concatenate([polygon((top, y)), arc(low - 0.14, 0.66, 0.14, 0.14, 0, 90, 8)])
    edge = curve((top + 0.03, y - 0.02), (top + 0.06, y + flap * 0.6), (top - 0.14, y + flap), (0, y + flap + 0.06))
    return fit(
        Part(arc(0, y, 0.36, reach, 180, 360), "dark", 0.12),
        Part(mirror(body), "main"),
        Part(rect(-low + 0.02, 0.66, 2 * low - 0.04, 0.14, 0.07), "dark"),
        Part(mirror(edge), "accent"),
        *(Part(ellipse(s * 0.36, y + 0.06, 0.08), "metal") for s in (-1, 1)),
        Part(rect(-0.11, y + flap - 0.07, 0.22, 0.22, 0.05), "metal"),
    )


def glasses(rng: np.random.Generator) -> list[Part]:
    """Spectacles from the front, thick frames and pale lenses."""
    h, taper, frame = rng.uniform(0.3, 0.38), rng.uniform(0.8, 1.0), rng.uniform(0.1, 0.14)
    top = [(0.18, -h * 0.75), (0.5, -h), (0.83, -h * 0.75)]
    lens = curve(*top, (0.08 + 0.77 * taper, h * 0.45), (0.48, h), (0.22, h * 0.5), closed=True)
    outer = (lens - [0.5, 0]) * [1 + frame / 0.34, 1 + frame / h] + [0.5, 0]
    glint = polygon((0.4, h * 0.35), (0.6, -h * 0.5))
    hinge = rect(0.84, -h * 0.85, 0.2, 0.2, 0.05)
    return fit(
        Part(arc(0, -0.06, 0.16, 0.16, 180, 360), "main", 0.12),
        *(Part(p, "accent") for p in (hinge, flip(hinge))),
        *(Part(p, "main") for p in (outer, flip(outer))),
        *(Part(p, "glass") for p in (lens, flip(lens))),
        *(Part(glint - [x, 0], "light", 0.1) for x in (0, 0.98)),
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
    return fit(
        Part(mirror(half), "main"),
        Part(cuff, "accent"),
        Part(flip(cuff), "accent"),
        *(Part(rect(-w, y, 2 * w, 0.1), "accent") for y in rows),
        Part(arc(0, -0.8, neck, 0.22, 0, 180), "dark"),
        Part(arc(0, -0.8, neck + 0.02, 0.23, 0, 180), "light", 0.08),
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
    return fit(
        Part(np.concatenate([curve(*ankle, n=10), back]), "main"),
        Part(curve(*cap, (toe + 0.02, 0.7)), "accent"),
        Part(rect(-w - 0.12, -0.92, 2 * w + 0.16, cuff, 0.05), "accent"),
        stroke((-w + 0.08, 0.4), (w * 0.6, 0.4), tone="light", width=0.11),
        Part(polygon((-w - 0.06, 0.64), (end, 0.64), *under), "dark"),
    )
