"""Things of a household, drawn as vector parts."""

from __future__ import annotations

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


def mug(rng: np.random.Generator) -> list[Part]:
    """A mug with a handle on the right and a stripe round it."""
    w, low, h = rng.uniform(0.52, 0.62), rng.uniform(0.84, 1.0), rng.uniform(0.58, 0.7)
    reach, y, band = rng.uniform(0.34, 0.46), rng.uniform(-0.1, 0.1), rng.uniform(0.18, 0.34)
    foot = w * low
    side = w - (w - foot) / 2
    return fit(
        Part(arc(side - 0.04, 0.03, reach, h * 0.62, -90, 90), "main", 0.17),
        Part(hoop(w, foot, -h, h, 0.15), "main"),
        Part(hoop(side, side - 0.01, y, y + band, 0.15), "accent"),
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
    return fit(
        Part(mirror(shape), "main"),
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
    return fit(
        Part(ellipse(0, y + 0.01, 0.16, 0.14), "light"),
        Part(mirror(foot), "accent"),
        Part(rect(-0.38, 0.8, 0.76, 0.14, 0.06), "dark"),
        stroke((low * 0.6, y), (low * 0.6, y + 0.26), tone="metal", width=0.07),
        Part(ellipse(low * 0.6, y + 0.28, 0.07), "metal"),
        Part(mirror(polygon((top, -0.9), (low, y))), "main"),
        Part(mirror(polygon((top, -0.9), (top + 0.08 * slant, -0.82))), "accent"),
        Part(mirror(rim), "accent"),
    )


def chair(rng: np.random.Generator) -> list[Part]:
    """A dining chair from the front: padded back, padded seat, wooden legs."""
    w, back, seat = rng.uniform(0.44, 0.54), rng.uniform(0.5, 0.64), rng.uniform(0.02, 0.12)
    splay, r = rng.uniform(0.0, 0.1), rng.uniform(0.06, 0.24)
    top = -0.92
    front = w + 0.12
    cushion = curve((w - 0.06, seat), (w + 0.02, seat + 0.04), (front, seat + 0.2), (front - 0.04, seat + 0.28), n=6)
    return fit(
        *(stroke((s * w * 0.72, 0.3), (s * w * 0.72, 0.72), tone="dark", width=0.1) for s in (-1, 1)),
        *(stroke((s * w * 0.7, seat + 0.1), (s * w * 0.7, top + 0.2), tone="accent", width=0.12) for s in (-1, 1)),
        *(stroke((s * w, 0.3), (s * (w + splay), 0.92), tone="accent", width=0.13) for s in (-1, 1)),
        Part(rect(-w, top, 2 * w, back, r), "main"),
        Part(rect(-w + 0.04, seat + 0.24, 2 * w - 0.08, 0.16), "accent"),
        Part(mirror(cushion), "main"),
        stroke((-w * 0.5, top + back / 2), (w * 0.5, top + back / 2), tone="light", width=0.09),
    )


def sofa(rng: np.random.Generator) -> list[Part]:
    """A two-seat sofa with round arms, a throw pillow and short legs."""
    h, arm, r = rng.uniform(0.54, 0.66), rng.uniform(0.24, 0.3), rng.uniform(0.1, 0.2)
    side, tilt = rng.choice([-1.0, 1.0]), rng.uniform(0.02, 0.08)
    inner = 0.92 - arm
    pillow = polygon((-0.16, -0.26), (0.18, -0.26 + tilt), (0.18, 0.14), (-0.18, 0.14)) + [inner - 0.2, 0]
    return fit(
        *(stroke((s * 0.72, 0.42), (s * 0.76, 0.64), tone="dark", width=0.12) for s in (-1, 1)),
        Part(rect(-0.78, -h, 1.56, 0.9, r), "main"),
        stroke((0, 0.12 - h), (0, 0.1), width=0.07),
        Part(pillow * [side, 1], "accent"),
        Part(rect(-inner, 0.2, 2 * inner, 0.2), "dark"),
        *(Part(rect(x, 0.06, inner - 0.02, 0.25, 0.08), "light") for x in (-inner, 0.02)),
        Part(rect(-0.8, 0.34, 1.6, 0.18, 0.04), "main"),
        *(Part(rect(s * (0.92 - arm / 2) - arm / 2, -0.16, arm, 0.68, arm / 2), "main") for s in (-1, 1)),
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
    return fit(
        Part(ellipse(dish + 0.1, 0.68, 0.14), "metal", 0.1, True),
        Part(mirror(curve((dish, 0.6), (dish - 0.04, 0.74), (dish * 0.6, 0.86), (0, 0.88), n=8)), "metal"),
        Part(hoop(w, w, top, 0.64, 0.06), "main"),
        Part(curve(*left, *right), "light"),
        Part(ellipse(0, top, w, 0.08), "light"),
        stroke((0, top), (0, top - 0.14), width=0.08),
        Part(mirror(fire), "accent"),
        Part(mirror(fire * [0.5, 0.5] + [0, (top - 0.08) * 0.5]), "light"),
    )


def plant(rng: np.random.Generator) -> list[Part]:
    """A leafy house plant in a pot."""
    w, low, h = rng.uniform(0.38, 0.46), rng.uniform(0.66, 0.8), rng.uniform(0.44, 0.52)
    spread, size = rng.uniform(0.92, 1.08), rng.uniform(0.19, 0.23)
    y = 0.9 - h
    shape = [(-74, 0.72), (74, 0.72), (-38, 0.98), (38, 0.98), (0, 1.1)]
    grown = [(a, length * rng.uniform(0.92, 1.06)) for a, length in shape]
    leaves = [pointed_leaf(0.08 * np.sign(a), y - 0.02, a * spread, length, size) for a, length in grown]
    return fit(
        *(part for leaf in leaves for part in leaf),
        Part(mirror(polygon((w, y), (w * low, 0.9))), "accent"),
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
    return fit(
        *(stroke((s * 0.34, 0.5), (s * 0.56, 0.86), tone="dark", width=0.13) for s in (-1, 1)),
        stroke((0, -r + 0.1), (0, -r - 0.16), tone="dark", width=0.09),
        Part(rect(-0.1, -r - 0.24, 0.2, 0.12, 0.04), "dark"),
        Part(dome, "accent"),
        Part(flip(dome), "accent"),
        Part(ellipse(0, 0, r), "main"),
        Part(ellipse(0, 0, r - rim), "light"),
        *(Part(ellipse(tick * x, tick * y, 0.05), "accent") for x, y in ((0, -1), (1, 0), (0, 1), (-1, 0))),
        stroke((0, 0), (0.26 * np.cos(hour), 0.26 * np.sin(hour)), width=0.1),
        stroke((0, 0), (0.38 * np.cos(minute), 0.38 * np.sin(minute)), width=0.07),
    )


def teapot(rng: np.random.Generator) -> list[Part]:
    """A round teapot: spout to the left, handle to the right, lid with a knob."""
    w, h, band = rng.uniform(0.52, 0.58), rng.uniform(0.46, 0.54), rng.uniform(0.12, 0.18)
    lid, handle = rng.uniform(0.28, 0.34), rng.uniform(0.26, 0.32)
    under = curve((-w + 0.1, 0.34), (-w - 0.16, 0.16), (-w - 0.26, -0.2), (-w - 0.42, -0.36))
    over = curve((-w - 0.2, -0.42), (-w - 0.08, -0.2), (-w + 0.12, -0.08), (-w + 0.2, 0.34))
    return fit(
        Part(arc(w - 0.06, -0.02, handle, 0.32, -100, 100), "main", 0.14),
        Part(np.concatenate([under, over]), "main"),
        Part(rect(-0.3, h - 0.08, 0.6, 0.16, 0.05), "dark"),
        Part(ellipse(0, 0, w, h), "main"),
        Part(hoop(w * 0.96, w * 0.96, 0.0, band, 0.1), "accent"),
        Part(ellipse(0, -h - 0.12, 0.1), "dark"),
        Part(arc(0, -h * 0.78, lid, h * 0.42, 180, 360), "accent"),
        Part(rect(-lid - 0.05, -h * 0.8, 2 * lid + 0.1, 0.09, 0.04), "dark"),
    )


def cupcake(rng: np.random.Generator) -> list[Part]:
    """A cupcake: pleated paper case, three swirls of icing, a cherry."""
    w, low, h = rng.uniform(0.56, 0.64), rng.uniform(0.68, 0.78), rng.uniform(0.17, 0.2)
    y, cherry, n = rng.uniform(0.1, 0.18), rng.uniform(0.13, 0.16), 4
    pleats = [-0.75 + 1.5 * i / (n - 1) for i in range(n)]
    swirls = [(w + 0.16, y), (w - 0.06, y - 1.35 * h), (w * 0.52, y - 2.7 * h)]
    return fit(
        Part(mirror(polygon((w, y), (w * low, 0.9))), "accent"),
        *(stroke((w * q, y + 0.1), (w * low * q, 0.87), tone="light", width=0.08) for q in pleats),
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
    return fit(
        Part(handle, "main", 0.11),
        Part(flip(handle), "main", 0.11),
        Part(mirror(cup), "main"),
        Part(rect(-w - 0.07, -0.92, 2 * w + 0.14, 0.14, 0.06), "accent"),
        Part(star + [0, -0.38], "light"),
        Part(rect(-base + 0.08, 0.54, 2 * base - 0.16, 0.12, 0.03), "accent"),
        Part(rect(-base, 0.64, 2 * base, 0.28, 0.04), "dark"),
        Part(rect(-0.2, 0.72, 0.4, 0.12, 0.02), "metal"),
    )
