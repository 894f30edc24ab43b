"""Nameless shapes and styles, composed at random.

A base model whose whole world is 22 things in 12 styles has no room between them: a thirteenth style is then no place
that an adapter could move it to. Real base models have seen millions of things that no caption names. So a share of
pico's training pictures shows nameless ones, each called by a random word in pointed brackets, as triggers are: such a
word asks for something new, and what, the adapter says.

The reserved subjects and styles are not among them: nothing here draws tiles in mortar, rays, or a subject of the
world. A hatched fill, a dark ground or a pale outline are, each by itself: they are what drawing is made of.
"""

from __future__ import annotations

import string
from collections.abc import Callable
from dataclasses import replace

import cv2
import numpy as np

from qrlora.pico.world.canvas import SCALE, SIZE, WIDE, Canvas, grid, noise, warp
from qrlora.pico.world.palette import Palette
from qrlora.pico.world.shapes import TONES, Part, curve, ellipse, fit, flip, mirror, polygon, rect
from qrlora.pico.world.styles import Picture, mix

Style = Callable[[Canvas, Palette], Picture]
Rng = np.random.Generator


def word(rng: Rng) -> str:
    """A word such as ``<k3>``: one to three letters or digits in pointed brackets."""
    letters = list(string.ascii_lowercase + string.digits)
    return f"<{''.join(rng.choice(letters, rng.integers(1, 4)))}>"


# ---------------------------------------------------------------- things


def _half(rng: Rng) -> np.ndarray:
    """A closed symmetric outline through random points."""
    n = int(rng.integers(3, 7))
    points = list(zip(rng.uniform(0.08, 0.62, n), np.linspace(-0.9, 0.9, n), strict=True))
    return mirror((curve if rng.random() < 0.6 else polygon)(*points))


def _blob(rng: Rng) -> np.ndarray:
    """A closed outline round the centre, smooth or with corners."""
    n = int(rng.integers(4, 9))
    angles = np.sort(rng.uniform(0, 2 * np.pi, n))
    points = np.stack([np.cos(angles), np.sin(angles)], 1) * rng.uniform(0.4, 0.95, (n, 1)) * rng.uniform(0.5, 1, 2)
    return curve(*map(tuple, points.tolist()), closed=True) if rng.random() < 0.6 else points


def _detail(rng: Rng) -> Part:
    """A smaller part anywhere on or at the body: disc, box, blob or stroke."""
    x, y = rng.uniform(-0.6, 0.6), rng.uniform(-0.75, 0.75)
    tone, size = TONES[rng.integers(len(TONES))], rng.uniform(0.08, 0.4)
    kind = rng.integers(5)
    if kind == 0:
        return Part(ellipse(x, y, size, size * rng.uniform(0.4, 1.2)), tone)
    if kind == 1:
        h = size * rng.uniform(0.3, 1.4)
        return Part(rect(x - size, y - h / 2, 2 * size, h, rng.uniform(0, 0.12)), tone)
    if kind == 2:
        return Part(_blob(rng) * size + [x, y], tone)
    bent = curve((x, y), *((x + a, y + b) for a, b in rng.uniform(-0.5, 0.5, (int(rng.integers(1, 3)), 2))))
    return Part(bent, tone, rng.uniform(0.06, 0.18))


def thing(rng: Rng) -> list[Part]:
    """A shape that nothing in the world has: a body, and two to seven parts, in pairs or alone."""
    parts = [Part(_half(rng) if rng.random() < 0.6 else _blob(rng), "main")]
    for _ in range(int(rng.integers(2, 6))):
        part = _detail(rng)
        pair = replace(part, points=flip(part.points))
        added = [part, pair] if rng.random() < 0.35 else [part]
        parts = added + parts if rng.random() < 0.3 else parts + added
    return fit(*parts)


# ---------------------------------------------------------------- styles


def _screen(rng: Rng) -> np.ndarray:
    """A pattern in [0, 1], fixed to the plane: hard or soft stripes, dots, checks, or mottled."""
    x, y = grid()
    period, kind = float(rng.choice([4, 8, 16])), rng.integers(4)
    if kind == 0:
        u = (x, y, x + y, x - y, x + 0.5 * y, 0.5 * x - y)[rng.integers(6)]
        wave = 0.5 + 0.5 * np.cos(u * 2 * np.pi / period + rng.uniform(0, 6) + noise(71, 12) * rng.choice([0, 0, 1.5]))
    elif kind == 1:
        slant = rng.random() < 0.5
        u, v = (x + y, x - y) if slant else (x, y)
        wave = 0.5 + 0.25 * (np.cos(u * 2 * np.pi / period) + np.cos(v * 2 * np.pi / period))
    elif kind == 2:
        wave = 0.5 + 0.5 * np.sign(np.cos(x * np.pi / period) * np.cos(y * np.pi / period))
    else:
        wave = 0.5 + 0.5 * noise(int(rng.integers(72, 76)), float(rng.choice([2, 4, 12])))
    if rng.random() < 0.5:
        return np.asarray(wave, np.float32)
    return (wave > rng.uniform(0.3, 0.7)).astype(np.float32)


def _colour(rng: Rng, light: tuple[float, float]) -> np.ndarray:
    """Return any hue, of a lightness (the mean of the channels) within the bounds."""
    hue = rng.dirichlet([0.7, 0.7, 0.7]) * 3
    level = rng.uniform(*light)
    grey = rng.uniform(0.1, 0.9)
    return np.clip(level * (grey + (1 - grey) * hue), 0, 1).astype(np.float32)


def _tones(rng: Rng, p: Palette) -> np.ndarray:
    """The palette's tones changed at random: themselves, paler, deeper, or steps between two colours by lightness."""
    kind = rng.integers(5)
    if kind < 2:
        return p.tones
    if kind == 2:
        pale = rng.uniform(0.3, 0.7)
        return p.tones * (1 - pale) + pale * _colour(rng, (0.6, 1.0))
    if kind == 3:
        return p.tones * rng.uniform(0.3, 0.8)
    luma = (p.tones @ np.array([0.299, 0.587, 0.114], np.float32))[:, None]
    return _colour(rng, (0.05, 0.45)) * (1 - luma) + _colour(rng, (0.55, 1.0)) * luma


def _backdrop(rng: Rng, p: Palette) -> np.ndarray:
    """A plain ground, or one with a pattern, or fading."""
    bounds = ((0.7, 1.0), (0.03, 0.3), (0.3, 0.7))[rng.choice(3, p=(0.4, 0.35, 0.25))]
    ground = p.background if rng.random() < 0.2 else _colour(rng, bounds)
    out = np.broadcast_to(ground, (WIDE, WIDE, 3)).astype(np.float32)
    if rng.random() < 0.5:
        out = mix(out, _colour(rng, bounds), _screen(rng) * rng.uniform(0.15, 0.7))
    if rng.random() < 0.3:
        x, y = grid()
        fade = y / SIZE if rng.random() < 0.5 else np.hypot(x - SIZE / 2, y - SIZE / 2) / SIZE
        return np.asarray(out * (1 + rng.uniform(-0.35, 0.35) * fade[..., None]), np.float32)
    return out


def _body(rng: Rng, c: Canvas, ground: np.ndarray, tones: np.ndarray) -> np.ndarray:
    """The parts filled: with their tones or not at all, shaded or not, with a pattern or not."""
    out = tones[c.tone].astype(np.float32)
    if rng.random() < 0.2:
        out = mix(out, ground, np.asarray(rng.uniform(0.6, 1.0), np.float32))
    shade = rng.integers(4)
    if shade == 0:
        out = out * (1 - rng.uniform(0.15, 0.4) * (c.mask * (1 - warp(c.mask, 5.0, 1.0)))[..., None])
    elif shade == 1:
        out = out * (0.7 + 0.35 * (np.clip(c.depth, 0, 9) / 9) ** 0.5)[..., None]
    if rng.random() < 0.65:
        other = (np.clip(out * 0.4 + 0.6, 0, 1), out * 0.55, ground, _colour(rng, (0.0, 1.0)))[rng.integers(4)]
        parts = c.is_tone(*rng.choice(TONES, 3, replace=False)) if rng.random() < 0.25 else 1.0
        out = mix(out, other, _screen(rng) * parts * rng.uniform(0.4, 1.0))
    return out


def _outline(rng: Rng, c: Canvas, out: np.ndarray, tones: np.ndarray) -> np.ndarray:
    """Lines along the parts: dark, light, of any colour or of the tones', straight or shaky, and glowing or not."""
    lines = c.lines(rng.uniform(1.4, 3.6))
    if rng.random() < 0.4:
        shake = noise(int(rng.integers(76, 79)), 12) * rng.uniform(0.5, 1.5)
        lines = warp(lines, shake, shake.T)
    own = np.where(c.mask[..., None] > 0, tones[c.tone], tones[0])
    kinds = (_colour(rng, (0.0, 0.2)), _colour(rng, (0.8, 1.0)), _colour(rng, (0.2, 0.8)), own * 0.5, own * 0.4 + 0.6)
    colour = np.broadcast_to(kinds[rng.integers(5)], out.shape).astype(np.float32)
    if rng.random() < 0.15:
        out = out + cv2.GaussianBlur(colour * lines[..., None], (0, 0), 4.0 * SCALE)
    return mix(out, colour, lines * rng.uniform(0.7, 1.0))


def style(seed: int) -> Style:
    """A way to draw that has no name; the same for the same seed."""

    def drawn(c: Canvas, p: Palette) -> Picture:
        rng = np.random.default_rng((seed, 1))
        ground, tones = _backdrop(rng, p), _tones(rng, p)
        out = ground
        if rng.random() < 0.3:  # a cast shadow, or a rim all round
            size = int(rng.integers(2, 7)) * SCALE + 1
            rim = cv2.dilate(c.mask, cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (size, size)))
            if rng.random() < 0.5:
                out = out * (1 - rng.uniform(0.2, 0.5) * warp(rim, -3.0, -4.0)[..., None])
            else:
                out = mix(out, _colour(rng, (0.0, 1.0)), rim)
        out = mix(out, _body(rng, c, ground, tones), c.mask)
        if rng.random() < 0.8:
            out = _outline(rng, c, out, tones)
        return np.clip(out, 0, 1).astype(np.float32)

    return drawn
