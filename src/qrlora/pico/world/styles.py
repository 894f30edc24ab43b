"""The ways a picture is drawn. A style decides how, never what: it sees part and tone maps and a palette.

Every screen (dots, hatching, stitches, tiles) is fixed to the picture plane with a period that divides 8 pixels.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

import cv2
import numpy as np

from qrlora.pico.world.canvas import SCALE, SIZE, WIDE, Canvas, grid, noise, warp
from qrlora.pico.world.palette import Palette, rgb

Picture = np.ndarray  # (WIDE, WIDE, 3) float32 in [0, 1]


def _blur(image: np.ndarray, pixels: float) -> np.ndarray:
    return cv2.GaussianBlur(image, (0, 0), pixels * SCALE)


def mix(below: np.ndarray, above: np.ndarray, amount: np.ndarray) -> np.ndarray:
    """``above`` over ``below``, where ``amount`` (h, w) is 1.

    Whole float32 pictures go through cv2: the same three operations, without numpy's loop over three channels.
    """
    whole = (WIDE, WIDE, 3)
    if below.shape == above.shape == whole and below.dtype == above.dtype == amount.dtype == np.float32:
        change = cv2.subtract(np.ascontiguousarray(above), np.ascontiguousarray(below))
        cv2.multiply(change, cv2.merge((np.ascontiguousarray(amount),) * 3), change)
        return cv2.add(below, change, change)
    return below + (above - below) * amount[..., None]


def _plain(colour: np.ndarray) -> Picture:
    return np.broadcast_to(colour, (WIDE, WIDE, 3)).astype(np.float32)


def look_up(index: np.ndarray, colours: np.ndarray) -> Picture:
    """``colours[index]``: (h, w) uint8 into (n, 3), as float32."""
    table = np.zeros((3, 256), np.float32)
    table[:, : len(colours)] = colours.T
    return cv2.merge([cv2.LUT(index, channel) for channel in table])


def _colours(c: Canvas, p: Palette) -> Picture:
    """The tone's colour at every sample, the background's elsewhere."""
    return look_up(np.where(c.label > 0, c.tone, np.uint8(len(p.tones))), np.vstack([p.tones, p.background]))


def _ground(c: Canvas, strength: float = 0.16) -> np.ndarray:
    """A soft shadow on the ground below the subject."""
    ys, xs = np.nonzero(c.label)
    shade = np.zeros((WIDE, WIDE), np.float32)
    centre, half = (int(xs.mean()), int(ys.max()) - SCALE), int((xs.max() - xs.min()) * 0.48)
    cv2.ellipse(shade, centre, (half, 4 * SCALE), 0, 0, 360, 1.0, -1)
    return _blur(shade, 2.0) * strength * (1 - c.mask)


def _darkness(c: Canvas, p: Palette) -> np.ndarray:
    """Compute the darkness of each sample's tone, in [0, 1], with a light from the upper left."""
    luma = _colours(c, p) @ np.array([0.299, 0.587, 0.114], np.float32)
    x, _ = grid()
    return np.clip((1 - luma) * 0.75 + 0.30 * (x / SIZE - 0.35), 0, 1) * c.mask


def flat(c: Canvas, p: Palette) -> Picture:
    """Flat colours, a darker right-hand side, a soft shadow."""
    out = _colours(c, p) * (1 - _ground(c)[..., None])
    side = c.mask * (1 - warp(c.mask, 5.0, 1.0))
    return mix(out, out * 0.78, side)


def ink(c: Canvas, p: Palette) -> Picture:
    """Black brush lines on white paper, dark parts solid, a grey wash on the second tone."""
    wobble = noise(11, 16) * 0.8
    lines, dark = warp(c.lines(3.2), wobble, wobble.T), c.is_tone("dark")
    wash = warp(c.is_tone("accent", "metal"), -2.0, -2.0) * c.mask
    paper = mix(_plain(rgb("#fdfdf8")), _plain(rgb("#b9bcc2")), wash)
    return mix(paper, _plain(rgb("#14141a")), np.maximum(lines, dark))


def pixel(c: Canvas, p: Palette) -> Picture:
    """Square pixels, 32 by 32, with a dark outline one pixel wide."""
    n = SIZE // 4
    small = cv2.resize(_colours(c, p), (n, n), interpolation=cv2.INTER_AREA)
    mask = (cv2.resize(c.mask, (n, n), interpolation=cv2.INTER_AREA) > 0.5).astype(np.uint8)
    rim = cv2.dilate(mask, cv2.getStructuringElement(cv2.MORPH_CROSS, (3, 3))) - mask
    small = np.where(rim[..., None] > 0, rgb("#1d1b2e"), np.round(small * 6) / 6).astype(np.float32)
    small[-5:][(mask + rim)[-5:] == 0] *= 0.82
    return cv2.resize(small, (WIDE, WIDE), interpolation=cv2.INTER_NEAREST)


@lru_cache(maxsize=1)
def _halftone_screen() -> np.ndarray:
    x, y = grid()
    u, v = (x + y) * np.pi / 8, (x - y) * np.pi / 8
    return np.asarray(0.5 + 0.25 * (np.cos(u) + np.cos(v)))


def halftone(c: Canvas, p: Palette) -> Picture:
    """Comic printing: colour dots on a diagonal screen of 8 pixels, a black outline."""
    screen = _halftone_screen()
    sky = mix(_plain(rgb("#fffdf2")), _plain(p.background * 0.88), (screen > 0.62).astype(np.float32))
    colour = _colours(c, p)
    dots = (screen > 1.02 - 0.85 * np.clip(_darkness(c, p) + 0.28, 0, 1)).astype(np.float32)
    body = mix(mix(_plain(rgb("#fffdf2")), colour, np.float32(0.35) * c.mask), colour * 0.92, dots)
    return mix(mix(sky, body, c.mask), _plain(rgb("#101018")), c.lines(2.4))


def watercolour(c: Canvas, p: Palette) -> Picture:
    """Wet colour on paper: wobbling borders, pigment gathered at the edge, mottled inside, no outline."""
    dx, dy = noise(21, 12) * 2.2, noise(22, 12) * 2.2
    mask, colour = warp(c.mask, dx, dy), _blur(warp(_colours(c, p), dx, dy), 0.8)
    paper = _plain(rgb("#fbf8ef")) * (1 + 0.02 * noise(23, 3)[..., None])
    seams = _blur(warp(c.boundary.astype(np.float32), dx, dy), 1.0)
    edge = np.clip(mask - _blur(mask, 2.2), 0, 1) + np.clip(seams, 0, 0.5)
    strength = np.clip(0.72 + 0.22 * noise(24, 14) + 0.5 * edge, 0.3, 1.0) * _blur(mask, 0.5)
    bleed = _blur(mask, 6.0) * 0.16 * (1 - mask)
    return np.clip(
        mix(mix(paper, p.tones[0] * 0.6 + 0.4, bleed), colour * (1 - 0.25 * edge[..., None]), strength), 0, 1
    )


def neon(c: Canvas, p: Palette) -> Picture:
    """Glowing tubes along every outline, on a dark wall."""
    tubes = c.lines(2.3)
    # the tube takes the most vivid colour near it: dark parts glow in the main colour
    vivid = p.tones.copy()
    vivid[2], vivid[3], vivid[4] = p.tones[0], rgb("#ffffff"), rgb("#7fe9ff")
    vivid = np.clip(vivid * 1.15 + 0.05, 0, 1).astype(np.float32)
    colour = np.where(c.mask[..., None] > 0, vivid[c.tone], vivid[0]).astype(np.float32)
    light = colour * tubes[..., None]
    glow = _blur(light, 2.2) * 0.9 + _blur(light, 7.0) * 0.9
    wall = _plain(rgb("#0d0b1f")) + 0.03 * (grid()[1] / SIZE)[..., None]
    return np.clip(np.maximum(wall + glow, (0.45 + 0.55 * colour) * tubes[..., None]), 0, 1)


def blueprint(c: Canvas, p: Palette) -> Picture:
    """White construction lines on blue paper with a grid of 16 pixels."""
    x, y = grid()
    rules = ((x % 16 < 0.9) | (y % 16 < 0.9)).astype(np.float32) * 0.22
    hatch = ((x - y) % 8 < 1.4).astype(np.float32) * c.is_tone("accent", "dark") * 0.55
    paper = mix(_plain(rgb("#1c4e9e")), _plain(rgb("#cfe4ff")), rules * (1 - 0.7 * c.mask))
    paper = mix(paper, _plain(rgb("#2f66b8")), c.mask * 0.6)
    return mix(paper, _plain(rgb("#f4f9ff")), np.maximum(c.lines(2.5), hatch))


def _shards() -> tuple[np.ndarray, np.ndarray]:
    """A fixed tiling of the plane into glass pieces: the piece at every sample, and the lead between pieces."""
    rng = np.random.default_rng(31)
    gx, gy = np.meshgrid(np.arange(6), np.arange(6))
    points = (np.stack([gx, gy], -1).reshape(-1, 2) + 0.5 + rng.uniform(-0.32, 0.32, (36, 2))) * WIDE / 6
    x, y = np.meshgrid(np.arange(WIDE), np.arange(WIDE))
    piece = np.argmin([(x - a) ** 2 + (y - b) ** 2 for a, b in points], 0).astype(np.uint8)
    lead = cv2.morphologyEx(piece, cv2.MORPH_GRADIENT, np.ones((5, 5), np.uint8)) > 0
    return piece, lead.astype(np.float32)


_PIECE, _LEAD = _shards()
_GLASS = np.array([rgb(h) for h in ("#f2c14e", "#e8a33d", "#f6d98b", "#7fb7be", "#9ed0c9", "#c9dfa6", "#f0b67f")])


def stained_glass(c: Canvas, p: Palette) -> Picture:
    """Pieces of coloured glass held by lead, light coming through."""
    x, y = grid()
    ground = _GLASS[_PIECE % len(_GLASS)].astype(np.float32)
    tint = 1 + 0.16 * np.sin(_PIECE * 2.4).astype(np.float32)[..., None]
    body = np.clip(_colours(c, p) * 1.08 * tint, 0, 1)
    light = 1.12 - 0.35 * np.hypot(x - SIZE * 0.45, y - SIZE * 0.4) / SIZE
    glass = mix(ground, body, c.mask) * light[..., None]
    lead = np.maximum(_LEAD, c.lines(3.4))
    return np.clip(mix(glass, _plain(rgb("#16141c")), lead), 0, 1)


def engraving(c: Canvas, p: Palette) -> Picture:
    """Banknote lines: horizontal rules of 4 pixels that swell where the tone is dark."""
    x, y = grid()
    bend = c.depth.clip(0, 9) * 0.22
    phase = np.abs(((y + bend) % 4) / 4 - 0.5) * 2
    dark = _darkness(c, p)
    rules = (phase < 0.10 + 0.78 * dark).astype(np.float32) * c.mask
    cross = (np.abs(((x + y) % 8) / 8 - 0.5) * 2 < 0.34).astype(np.float32) * (dark > 0.62)
    sky = (np.abs((y % 4) / 4 - 0.5) * 2 < 0.13).astype(np.float32) * (1 - c.mask)
    lines = np.maximum.reduce([rules, cross, sky * 0.6, c.lines(2.0)])
    return mix(_plain(rgb("#f3ead2")), _plain(rgb("#3a2a1c")), lines)


def risograph(c: Canvas, p: Palette) -> Picture:
    """Two inks, pink and blue, printed one over the other and not quite in register."""
    luma = (p.tones @ np.array([0.299, 0.587, 0.114])).astype(np.float32)
    grain = noise(41, 1.5) * 0.5
    pink = c.mask * np.choose(c.tone, (0.9, 0.9, 0.9, 0.15, 0.9, 0.4))  # light parts and glass stay pale
    blue = c.mask * np.where(c.tone == 0, 0.22 + 0.25 * (1 - luma[0]), 1.15 - luma[c.tone])
    pink = np.clip(pink + 0.12 * grain * pink, 0, 1).astype(np.float32)
    blue = warp(np.clip(blue + 0.25 * grain * blue, 0, 1).astype(np.float32), -3.0, -2.0)
    sun = ((grid()[0] - 92) ** 2 + (grid()[1] - 38) ** 2 < 26**2).astype(np.float32) * 0.28 * (1 - c.mask)
    out = _plain(rgb("#f7f3e8"))
    out = out * (1 - np.maximum(pink, sun)[..., None] * (1 - rgb("#ff4c8b")))
    return np.clip(out * (1 - blue[..., None] * (1 - rgb("#2a52be"))), 0, 1).astype(np.float32)


@lru_cache(maxsize=1)
def _threads() -> tuple[np.ndarray, tuple[np.ndarray, np.ndarray], np.ndarray]:
    """The linen's weave, satin stitches in two directions, and a cord."""
    x, y = grid()
    weave = 0.045 * (np.cos(x * np.pi / 2) + np.cos(y * np.pi / 2))
    even, odd = (
        0.80 + 0.24 * np.cos(slant * np.pi / 2 + np.floor(along / 16) * np.pi)
        for slant, along in ((x + y, x - y), (x - y, x + y))
    )
    return weave, (even, odd), 0.9 + 0.2 * np.cos((x + y) * np.pi / 2)


def embroidery(c: Canvas, p: Palette) -> Picture:
    """Satin stitches in slanting rows on linen, each part in its own direction, a corded edge."""
    x, y = grid()
    weave, (even, odd), rope_ = _threads()
    linen = _plain(rgb("#e6dcc6")) * (1 + weave[..., None])
    along = np.where(c.label % 2 == 0, x - y, x + y)
    thread = np.where(c.label % 2 == 0, even, odd)
    seam = ((along % 16) < 1.0).astype(np.float32) * 0.22
    body = np.clip(_colours(c, p) * (thread - seam)[..., None] + 0.06, 0, 1)
    cord = c.lines(2.2)
    out = mix(linen * (1 - 0.35 * _blur(c.mask, 2.0) * (1 - c.mask))[..., None], body, c.mask)
    rope = _colours(c, p) * 0.55 * rope_[..., None]
    return np.clip(mix(out, rope, cord * cv2.dilate(c.mask, np.ones((5, 5)))), 0, 1).astype(np.float32)


def clay(c: Canvas, p: Palette) -> Picture:
    """Soft modelled clay, lit from the upper left, on a seamless backdrop."""
    height = _blur(np.sqrt(np.clip(c.depth, 0, 10) / 10).astype(np.float32), 1.0)
    gx = cv2.Sobel(height, cv2.CV_32F, 1, 0, ksize=3, scale=SCALE * 0.8)
    gy = cv2.Sobel(height, cv2.CV_32F, 0, 1, ksize=3, scale=SCALE * 0.8)
    light = np.clip(0.86 + 0.55 * (gx + gy) / np.sqrt(1 + gx**2 + gy**2), 0.42, 1.35)
    gloss = np.clip(gx + gy - 0.75, 0, 0.4)
    _, y = grid()
    wall = _plain(p.background * 0.55 + 0.42) * (1.04 - 0.16 * y / SIZE)[..., None]
    shadow = _blur(warp(c.mask, -5.0, -6.0), 3.5) * 0.30 * (1 - c.mask)
    body = (_colours(c, p) * 0.86 + 0.10) * light[..., None] + gloss[..., None]
    return np.clip(mix(wall * (1 - shadow[..., None]), body, _blur(c.mask, 0.3)), 0, 1)


def chalk(c: Canvas, p: Palette) -> Picture:
    """Chalk on a green board: broken lines, scribbled fill, dust."""
    x, y = grid()
    wobble = noise(51, 10) * 1.2
    tooth = 0.5 + 0.5 * noise(52, 1.4)
    pale = np.clip(p.tones * 0.62 + 0.40, 0, 1).astype(np.float32)
    colour = np.where(c.mask[..., None] > 0, pale[c.tone], pale[3]).astype(np.float32)
    scribble = (0.5 + 0.5 * np.cos((x + 0.8 * y + wobble * 2) * np.pi / 4)) ** 1.5
    fill = c.mask * scribble * (0.45 + 0.5 * tooth) * np.where(c.is_tone("dark") > 0, 0.25, 1.0)
    line = warp(c.lines(2.6), wobble, wobble.T) * np.clip(0.55 + 0.9 * tooth, 0, 1)
    dust = np.clip(noise(53, 30) * 0.5 + 0.5, 0, 1) * 0.08
    board = _plain(rgb("#23403a")) + dust[..., None]
    return np.clip(mix(mix(board, colour, fill), colour * 0.35 + 0.65, line), 0, 1)


def mosaic(c: Canvas, p: Palette) -> Picture:
    """Square tesserae of 8 pixels, cut where the subject's outline passes, set in grey mortar."""
    n = SIZE // 8
    x, y = grid()
    sand = np.array(rgb("#dcc79c"))
    cells = np.random.default_rng(61).uniform(0.80, 1.14, (n, n)).astype(np.float32)
    jitter = cv2.resize(cells, (WIDE, WIDE), interpolation=cv2.INTER_NEAREST)
    u, v = x % 8, y % 8
    shine = jitter * (1 + 0.10 * ((u + v) < 6) - 0.08 * ((u + v) > 11))
    tiles = np.where(c.mask[..., None] > 0, _colours(c, p) * 0.97, sand) * shine[..., None]
    joint = ((u < 0.75) | (u > 7.25) | (v < 0.75) | (v > 7.25)).astype(np.float32)
    mortar = np.maximum(joint, c.lines(2.0))
    return np.clip(mix(tiles, _plain(rgb("#6f665b")), mortar), 0, 1).astype(np.float32)


def candy(c: Canvas, p: Palette) -> Picture:
    """Sugar sticks: white and coloured diagonal stripes of 8 pixels, a thick white rim, a pink ground."""
    x, y = grid()
    stripe = (((x + y) % 16) < 8).astype(np.float32)
    colour = _colours(c, p)
    body = mix(colour, colour * 0.25 + 0.75, stripe)
    rim = cv2.dilate(c.mask, cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (6 * SCALE + 1, 6 * SCALE + 1)))
    drops = ((x % 16 - 8) ** 2 + (y % 16 - 8) ** 2 < 5).astype(np.float32)
    ground = mix(_plain(rgb("#ff9ec4")), _plain(rgb("#ffd3e4")), drops)
    ground = ground * (1 - 0.22 * warp(rim, -2.0, -3.0) * (1 - rim))[..., None]
    out = mix(mix(ground, _plain(rgb("#fffaf7")), rim), body, c.mask)
    return mix(out, colour * 0.55, c.lines(1.4) * c.mask)


def gold(c: Canvas, p: Palette) -> Picture:
    """Gold foil on black lacquer: a bright band across each part, thin lines between parts, rays behind."""
    x, y = grid()
    sweep = 0.5 + 0.5 * np.cos((x + 0.6 * y) * np.pi / 24 + c.label * 1.1)
    level = np.where(c.is_tone("dark") > 0, 0.15, np.where(c.is_tone("accent", "glass") > 0, 0.55, 0.85)) * (
        0.55 + 0.6 * sweep
    )
    ramp = np.array([rgb(h) for h in ("#2a1a06", "#8a5a14", "#d9a531", "#f7dc7c", "#fff6cf")], np.float32)
    pos = np.clip(level, 0, 1) * (len(ramp) - 1)
    low = np.minimum(pos.astype(int), len(ramp) - 2)
    foil = ramp[low] + (ramp[low + 1] - ramp[low]) * (pos - low)[..., None].astype(np.float32)
    angle = np.arctan2(y - SIZE * 0.55, x - SIZE / 2)
    rays = (np.cos(angle * 24) > 0.86).astype(np.float32) * (np.hypot(x - SIZE / 2, y - SIZE * 0.55) > 30) * 0.55
    lacquer = mix(_plain(rgb("#120d14")), _plain(rgb("#7a5216")), rays)
    return mix(mix(lacquer, foil, c.mask), _plain(rgb("#120d14")), c.lines(1.8))


STYLES: dict[str, Callable[[Canvas, Palette], Picture]] = {
    "flat": flat, "ink": ink, "pixel": pixel, "halftone": halftone, "watercolour": watercolour, "neon": neon,
    "blueprint": blueprint, "stained glass": stained_glass, "engraving": engraving, "risograph": risograph,
    "embroidery": embroidery, "clay": clay, "chalk": chalk, "mosaic": mosaic, "candy": candy, "gold": gold,
}  # fmt: skip
RESERVED_STYLES = ("chalk", "mosaic", "candy", "gold")
SEEN_STYLES = tuple(s for s in STYLES if s not in RESERVED_STYLES)
OWN_GROUND = (
    "ink", "neon", "blueprint", "stained glass", "engraving", "risograph", "embroidery", "watercolour",
    *RESERVED_STYLES,
)  # fmt: skip
"""Styles that bring their own background: captions name no background for them."""
