"""Things to use, read, play and travel with, drawn as vector parts."""

from __future__ import annotations

import numpy as np

from qrlora.pico.world.shapes import Part, arc, curve, ellipse, fit, flip, mirror, polygon, rect, stroke


def camera(rng: np.random.Generator) -> list[Part]:
    """A photo camera from the front."""
    h, r, hump = rng.uniform(0.46, 0.54), rng.uniform(0.38, 0.44), rng.uniform(0.24, 0.34)
    band, button = rng.uniform(0.2, 0.26), rng.uniform(0.5, 0.62)
    corner = arc(0.74, 0.16 - h, 0.16, 0.16, -90, 0, 8)
    return fit(
        Part(rect(button - 0.13, -h - 0.12, 0.26, 0.2, 0.05), "accent"),
        Part(rect(-0.72, -h - 0.07, 0.28, 0.14, 0.04), "dark"),
        Part(mirror(polygon((hump, -h - 0.2), (hump + 0.1, -h + 0.1))), "metal"),
        Part(rect(-0.9, -h, 1.8, 2 * h, 0.16), "main"),
        Part(mirror(np.concatenate([corner, polygon((0.9, band - h))])), "metal"),
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
    return fit(
        *(stroke((-head - 0.1, v), (head + 0.1, v), tone="metal", width=0.08) for v in (-0.93, -0.78)),
        Part(mirror(polygon((head, -1.02), (0.08, -0.66))), "accent"),
        Part(mirror(curve(*shoulder, *hips)), "main"),
        Part(curve((0.06, 0.3), (0.2, 0.28), (0.28, 0.42), (0.2, 0.54), (0.06, 0.5), closed=True), "accent"),
        Part(ellipse(0, y - 0.04, hole + 0.06), "light"),
        Part(ellipse(0, y - 0.04, hole), "dark"),
        Part(rect(-0.08, -0.7, 0.16, y + 0.54, 0.02), "dark"),
        *(stroke((-0.08, v), (0.08, v), tone="metal", width=0.08) for v in (-0.5, -0.28, -0.06)),
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
    return fit(
        Part(back, "main"),
        Part(pages, "light"),
        Part(
            polygon((flag, h), (flag + 0.14, h), (flag + 0.14, h + 0.2), (flag + 0.07, h + 0.12), (flag, h + 0.2)),
            "dark",
        ),
        Part(rect(0, 0, w, h, 0.04), "main"),
        Part(rect(0, 0, spine, h, 0.04), "accent"),
        *(stroke((mid - t, y), (mid + t, y), tone="light", width=0.1) for t, y in lines),
        Part(ellipse(mid, h * 0.66, r), "accent"),
    )


def phone(rng: np.random.Generator) -> list[Part]:
    """A smartphone from the front, two columns of icons on its screen."""
    w, r, rows = rng.uniform(0.46, 0.54), rng.uniform(0.12, 0.2), int(rng.integers(2, 4))
    dock, step, start = rng.uniform(0.2, 0.28), rng.uniform(0.31, 0.35), int(rng.integers(3))
    icons = [(column, row) for row in range(rows) for column in range(2)]
    tones = [("accent", "light", "main")[(start + column + row) % 3] for column, row in icons]
    spots = [rect((c - 0.5) * step - 0.125, -0.57 + i * (step - 0.01), 0.25, 0.25, 0.06) for c, i in icons]
    return fit(
        Part(rect(w - 0.03, -0.45, 0.09, 0.28, 0.03), "dark"),
        Part(rect(-w, -0.9, 2 * w, 1.8, r), "main"),
        Part(rect(-w + 0.12, -0.76, 2 * w - 0.24, 1.52, r * 0.5), "dark"),
        Part(rect(-0.15, -0.8, 0.3, 0.12, 0.05), "main"),
        *(Part(spot, tone) for spot, tone in zip(spots, tones, strict=True)),
        Part(rect(-w + 0.19, 0.69 - dock, 2 * w - 0.38, dock, 0.08), "glass"),
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
    return fit(
        Part(np.concatenate([curve(*back, *front), polygon((0.95, 0.36), (-0.92, 0.36))]), "main"),
        *(Part(window, "glass") for window in windows),
        Part(rect(-0.94, 0.29, 1.9, 0.12, 0.05), "dark"),
        stroke((-0.86, 0.11), (0.72, 0.11), tone="accent", width=0.1),
        Part(ellipse(0.82, nose + 0.14, 0.1, 0.09), "light"),
        *(Part(ellipse(x, 0.36, q), t) for x in (-0.52, 0.54) for q, t in ((r, "dark"), (r * 0.52, "metal"))),
    )


def rocket(rng: np.random.Generator) -> list[Part]:
    """A toy rocket taking off: nose cone, porthole, fins and flame."""
    w, nose, hole = rng.uniform(0.33, 0.39), rng.uniform(-0.48, -0.4), rng.uniform(0.16, 0.19)
    fin, flame = rng.uniform(0.28, 0.36), rng.uniform(0.4, 0.5)
    hull = curve((0, -0.95), (w * 0.55, -0.68), (w * 0.94, -0.3), (w, 0.0), (w * 0.88, 0.28), (w * 0.6, 0.5))
    wing = np.concatenate([curve((w * 0.9, 0.04), (w + fin * 0.8, 0.24), (w + fin, 0.66)), polygon((w * 0.7, 0.46))])
    fire = curve((0.24, 0.5), (0.29, 0.7), (0.13, 0.5 + flame * 0.8), (0, 0.55 + flame), n=8)
    return fit(
        Part(mirror(fire), "accent"),
        Part(mirror((fire - [0, 0.5]) * [0.5, 0.6] + [0, 0.5]), "light"),
        *(Part(p, "accent") for p in (wing, flip(wing))),
        Part(rect(-0.25, 0.46, 0.5, 0.14, 0.03), "dark"),
        Part(mirror(hull), "main"),
        Part(mirror(hull[hull[:, 1] < nose]), "accent"),
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
        parts += [stroke(*arm, tone="metal", width=0.14), Part(ellipse(s * hand, 0.36, 0.13), "accent")]
        parts += [stroke((s * 0.2, 0.5), (s * 0.2, 0.84), tone="metal", width=0.16)]
        parts += [Part(rect(s * 0.23 - 0.18, 0.78, 0.36, 0.17, 0.06), "accent")]
    return fit(
        *parts,
        stroke((0, -0.7), (0, -0.9), tone="metal", width=0.09),
        Part(ellipse(0, -0.94, 0.1), "accent"),
        stroke((-head - 0.08, -0.5), (head + 0.08, -0.5), tone="accent", width=0.2),
        Part(rect(-0.12, -0.3, 0.24, 0.2), "metal"),
        Part(rect(-head, -0.8, 2 * head, 0.58, r), "main"),
        *(Part(ellipse(s * x, -0.57, q), t) for q, t in ((eye, "light"), (0.06, "dark")) for s in (-1, 1)),
        stroke((-0.19, -0.34), (0.19, -0.34), width=0.09),
        Part(rect(-body, -0.16, 2 * body, 0.72, r), "main"),
        Part(rect(-body + 0.12, -0.04, 2 * body - 0.24, 0.34, 0.05), "light"),
        *(Part(ellipse(c, 0.13, 0.08), t) for c, t in ((-0.15, "accent"), (0.15, "dark"))),
    )
