"""Ways to draw that have no name but a word of their own, and can be described: ``STYLE_COUNT`` recipes, each fixed.

A recipe is put together from ground, fill, shading, pieces, outline, rim, shadow and finish. What makes a reserved
style that style is left out (``_reserved``): square pieces in mortar, scribbled chalk on a dark board, white stripes
within a white rim, bands of light on black with rays.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import cv2
import numpy as np

from qrlora.pico.world.canvas import SCALE, SIZE, WIDE, Canvas, grid, noise, warp
from qrlora.pico.world.palette import Palette, rgb
from qrlora.pico.world.patterns import CELLS, PATTERNS, cells, pattern
from qrlora.pico.world.styles import Picture, look_up, mix

STYLE_COUNT = 1600
_SEED = 20_260

COLOURS = {
    "pale": {
        "white": "#fbfaf6", "cream": "#f6ead0", "pale pink": "#f9d5dc", "pale blue": "#d3e6f7", "pale green": "#d5efd9",
        "pale yellow": "#fbf2b8", "lilac": "#e3d6f5", "light grey": "#d6d8dc", "peach": "#fbd9bf",
    },
    "mid": {
        "coral": "#ee7b65", "orange": "#ef9438", "gold": "#d9aa35", "lime": "#9ac746", "sea green": "#45ab8b",
        "turquoise": "#3cb4c4", "sky blue": "#5aa6e6", "violet": "#9170d8", "magenta": "#d553a8", "brown": "#a5713f",
        "grey": "#8b9097", "tan": "#c9a77a",
    },
    "dark": {
        "black": "#141418", "navy": "#17234f", "dark green": "#173c2c", "maroon": "#55152a", "dark purple": "#33195a",
        "dark brown": "#3c2616", "dark teal": "#0f3f4a", "charcoal": "#33363d",
    },
}  # fmt: skip
_NAMED = {name: rgb(code) for group in COLOURS.values() for name, code in group.items()}
_FILLS = ("solid", "hollow", "patterned", "patterned", "patterned", "two-tone", "faded")
_SHADES = ("none", "none", "shaded side", "rounded shading", "lit from above", "bevelled edges", "glossy")
_OUTLINES = ("none", "thin", "thick", "bold", "thick", "double", "dashed", "stitched", "shaky", "glowing", "offset")
_FINISHES = (
    "none", "none", "none", "grainy", "posterised", "scan lines", "soft light", "vignette", "paper", "misprinted",
)  # fmt: skip


@dataclass(frozen=True)
class Recipe:
    """Everything about one style; the names are what a description says."""

    level: str  # of the ground: pale, mid, dark, or "own" for the scene's background
    ground: str
    ground_pattern: str
    ground_period: int
    ground_second: str
    tones: str  # own, pale, deep, two-colour, one-colour
    ink: str
    paper: str
    fill: str
    pattern: str
    period: int
    tilt: int
    contrast: str  # of the pattern: pale, dark, ground, coloured
    shade: str
    pieces: str
    piece_size: int
    outline: str
    outline_colour: str
    width: float
    rim: str
    shadow: str
    finish: str
    strength: float


def _pick(rng: np.random.Generator, *choices: str, p: list[float] | None = None) -> str:
    return str(rng.choice(np.array(choices), p=p))


def _colour(rng: np.random.Generator, level: str) -> str:
    return _pick(rng, *COLOURS[level])


def _drawn(rng: np.random.Generator) -> Recipe:
    level = _pick(rng, "pale", "mid", "dark", "own", p=[0.36, 0.2, 0.3, 0.14])
    shown = "pale" if level == "own" else level
    outline_level = _pick(rng, "dark", "pale", "mid", "same", p=[0.4, 0.25, 0.2, 0.15])
    return Recipe(
        level=level,
        ground=_colour(rng, shown),
        ground_pattern=_pick(
            rng, "plain", "fading", "rays", *PATTERNS, p=[0.38, 0.1, 0.04] + [0.48 / len(PATTERNS)] * len(PATTERNS)
        ),
        ground_period=int(rng.choice([6, 8, 10, 12, 16, 20])),
        ground_second=_colour(rng, shown if rng.random() < 0.75 else "mid"),
        tones=_pick(rng, "own", "pale", "deep", "two-colour", "one-colour", p=[0.42, 0.14, 0.12, 0.2, 0.12]),
        ink=_colour(rng, "dark" if rng.random() < 0.6 else "mid"),
        paper=_colour(rng, "pale" if rng.random() < 0.7 else "mid"),
        fill=_pick(rng, *_FILLS),
        pattern=_pick(rng, *PATTERNS),
        period=int(rng.choice([4, 5, 6, 8, 10, 12])),
        tilt=int(rng.integers(4)),
        contrast=_pick(rng, "pale", "dark", "ground", "coloured"),
        shade=_pick(rng, *_SHADES),
        pieces=_pick(rng, "none", *CELLS, p=[0.84] + [0.16 / len(CELLS)] * len(CELLS)),
        piece_size=int(rng.choice([5, 6, 8])),
        outline=_pick(rng, *_OUTLINES),
        outline_colour="same" if outline_level == "same" else _colour(rng, outline_level),
        width=float(rng.uniform(1.2, 1.8)),
        rim="none" if rng.random() < 0.84 else _colour(rng, _pick(rng, "pale", "mid", "dark")),
        shadow=_pick(rng, "none", "cast shadow", "soft shadow", "long shadow", p=[0.64, 0.14, 0.14, 0.08]),
        finish=_pick(rng, *_FINISHES),
        strength=float(rng.uniform(0.55, 1.0)),
    )


def _reserved(r: Recipe) -> bool:
    """Return True if a recipe has what makes one of the reserved styles."""
    slants = ("hatched", "diamond", "checked", "zigzag", "striped", "upright striped")
    slanted = r.fill == "patterned" and r.pattern in slants
    chalk = r.level == "dark" and r.pattern == "scribbled" and r.fill == "patterned"
    candy = slanted and r.contrast == "pale" and r.rim != "none"
    gold = r.level == "dark" and (r.ground_pattern == "rays" or (r.paper == "gold" and r.tones == "two-colour"))
    mortar = r.fill == "patterned" and r.pattern in ("ruled", "brick") and r.period >= 6
    return chalk or candy or gold or mortar


def _luma(name: str) -> float:
    return float(_NAMED[name] @ np.array([0.299, 0.587, 0.114]))


def _unseen(r: Recipe) -> bool:
    """Return True if a subject could be invisible on its ground."""
    ground = 0.92 if r.level == "own" else _luma(r.ground)
    lines = r.outline not in ("none", "offset") and r.outline_colour != "same"
    lines = lines and abs(_luma(r.outline_colour) - ground) > 0.3
    if r.fill == "hollow" or (r.fill == "patterned" and r.contrast == "ground" and r.strength > 0.8):
        return not lines
    close = r.tones in ("one-colour", "two-colour") and abs(_luma(r.ink) - ground) < 0.22
    return (close or (r.tones == "pale" and ground > 0.75) or (r.tones == "deep" and ground < 0.25)) and not lines


@lru_cache(maxsize=STYLE_COUNT)
def recipe(number: int) -> Recipe:
    """The recipe of a nameless style."""
    rng = np.random.default_rng((_SEED, number))
    while True:
        found = _drawn(rng)
        if not _reserved(found) and not _unseen(found):
            return found


def description(number: int) -> list[str]:
    """Describe a nameless style, the most telling features first."""
    r = recipe(number)
    said = []
    if r.level != "own":
        kind = {"plain": "", "fading": "fading ", "rays": ""}.get(r.ground_pattern, f"{r.ground_pattern} ")
        said.append(f"{kind}{r.ground} ground" + (" with rays" if r.ground_pattern == "rays" else ""))
    fill = {"solid": "flat fill", "hollow": "hollow", "two-tone": "two-tone fill", "faded": "fading fill"}
    said.append(f"{r.pattern} fill" if r.fill == "patterned" else fill[r.fill])
    if r.outline == "none":
        said.append("no outline")
    else:
        colour = "matching" if r.outline_colour == "same" else r.outline_colour
        said.append(f"{r.outline} {colour} outline")
    if r.tones != "own":
        said.append({"pale": "pale colours", "deep": "deep colours", "two-colour": f"{r.ink} and {r.paper}",
                     "one-colour": f"all {r.ink}"}[r.tones])  # fmt: skip
    said += [f"{r.pieces} pieces"] if r.pieces != "none" else []
    said += [f"{r.rim} rim"] if r.rim != "none" else []
    return said + [word for word in (r.shadow, r.shade, r.finish) if word != "none"]


# ---------------------------------------------------------------- drawing


def _mix(below: Picture, above: np.ndarray | np.floating, amount: np.ndarray | float) -> Picture:
    """``above`` (a picture or a colour) over ``below``, by a map or a share."""
    if isinstance(amount, np.ndarray) and np.shape(above) == below.shape:
        return mix(below, np.asarray(above), amount)
    return below + (above - below) * (amount[..., None] if isinstance(amount, np.ndarray) else np.float32(amount))


def _blur(image: np.ndarray, pixels: float) -> np.ndarray:
    """A wide blur, done at a third of the samples: nothing finer is left of it anyway."""
    small = cv2.resize(image, (SIZE, SIZE), interpolation=cv2.INTER_AREA)
    return cv2.resize(cv2.GaussianBlur(small, (0, 0), pixels), (WIDE, WIDE), interpolation=cv2.INTER_LINEAR)


def _ground(r: Recipe, p: Palette) -> Picture:
    base = p.background if r.level == "own" else _NAMED[r.ground]
    out = np.empty((WIDE, WIDE, 3), np.float32)
    out[:] = base
    x, y = grid()
    if r.ground_pattern == "plain":
        return out
    second = _NAMED[r.ground_second].astype(np.float32)
    if r.ground_pattern == "fading":
        return _mix(
            out, second, (y / SIZE if r.tilt % 2 else np.hypot(x - SIZE / 2, y - SIZE / 2) / SIZE) * np.float32(0.8)
        )
    if r.ground_pattern == "rays":
        turn = np.arctan2(y - SIZE * 0.5, x - SIZE * 0.5)
        return _mix(out, second, (np.cos(turn * (6 + 2 * r.tilt)) > 0).astype(np.float32) * np.float32(0.7))
    return _mix(out, second, pattern(r.ground_pattern, r.ground_period, r.tilt) * np.float32(0.3 + 0.5 * r.strength))


def _tones(r: Recipe, p: Palette) -> np.ndarray:
    """(6, 3): what becomes of the palette's tones."""
    tones = p.tones.astype(np.float32)
    if r.tones == "pale":
        return tones * 0.45 + 0.55
    if r.tones == "deep":
        return tones * 0.55
    luma = (tones @ np.array([0.299, 0.587, 0.114], np.float32))[:, None]
    if r.tones == "two-colour":
        return _NAMED[r.ink] * (1 - luma) + _NAMED[r.paper] * luma
    if r.tones == "one-colour":
        return _NAMED[r.ink] * (0.75 + 0.5 * luma)
    return tones


def _body(r: Recipe, c: Canvas, tones: np.ndarray, ground: Picture) -> Picture:
    out = look_up(c.tone, tones)
    if r.fill == "hollow":
        out = _mix(out, ground, 0.92)
    elif r.fill == "two-tone":
        out = _mix(out, out * 0.6, (grid()[0] + grid()[1] > SIZE).astype(np.float32))
    elif r.fill == "faded":
        out = _mix(out, np.float32(0.97), (grid()[1] / SIZE).astype(np.float32) * np.float32(0.75))
    elif r.fill == "patterned":
        other = {"pale": out * 0.35 + 0.65, "dark": out * 0.5, "ground": ground, "coloured": _NAMED[r.paper]}[
            r.contrast
        ]
        out = _mix(out, np.asarray(other, np.float32), pattern(r.pattern, r.period, r.tilt) * np.float32(r.strength))
    return np.asarray(_shaded(r, c, out), np.float32)


def _shaded(r: Recipe, c: Canvas, out: Picture) -> Picture:
    if r.shade == "shaded side":
        return out * (1 - 0.3 * c.mask * (1 - warp(c.mask, 5.0, 1.0)))[..., None]
    if r.shade == "rounded shading":
        return out * (0.68 + 0.36 * np.sqrt(np.clip(c.depth, 0, 9) / 9))[..., None]
    if r.shade == "lit from above":
        return out * (1.18 - 0.45 * grid()[1] / SIZE)[..., None]
    if r.shade == "bevelled edges":
        edge = np.clip(3 - c.depth, 0, 3) / 3
        x, y = grid()
        return out * (1 + 0.4 * edge * np.where(x + y < SIZE, 1, -1))[..., None]
    if r.shade == "glossy":
        spot = np.exp(-((grid()[0] - SIZE * 0.4) ** 2 + (grid()[1] - SIZE * 0.36) ** 2) / 260.0)
        return _mix(out, np.float32(1.0), (0.6 * spot).astype(np.float32))
    return out


def _outlined(r: Recipe, c: Canvas, out: Picture, tones: np.ndarray) -> Picture:
    width = {"thin": 1.0, "thick": 2.0, "bold": 2.8, "double": 3.2, "glowing": 1.8}.get(r.outline, 1.7) * r.width
    lines = c.lines(width)
    if r.outline == "double":
        lines = lines * (1 - c.lines(width * 0.4))
    elif r.outline in ("dashed", "stitched"):
        x, y = grid()
        step = 8 if r.outline == "dashed" else 5
        lines = lines * (((x + y) % step < 0.62 * step) | ((x - y) % step < 0.2 * step))
    elif r.outline == "shaky":
        shake = noise(76 + r.tilt, 12) * np.float32(1.3)
        lines = warp(lines, shake, shake.T)
    elif r.outline == "offset":
        lines = warp(lines, -2.5, -2.0)
    own = look_up(np.where(c.label > 0, c.tone, np.uint8(0)), tones) * np.float32(0.5)
    colour = (
        own if r.outline_colour == "same" else np.broadcast_to(_NAMED[r.outline_colour], out.shape).astype(np.float32)
    )
    lines = lines.astype(np.float32)
    if r.outline == "glowing":
        out = out + _blur(colour * lines[..., None], 3.5)
    return _mix(out, colour, lines)


def _finished(r: Recipe, out: Picture) -> Picture:
    x, y = grid()
    if r.finish == "grainy":
        return out + (noise(41 + r.tilt, 1.4) * np.float32(0.1))[..., None]
    if r.finish == "posterised":
        return np.round(out * 4) / 4
    if r.finish == "scan lines":
        return out * (0.88 + 0.12 * np.cos(y * np.pi / 2))[..., None]
    if r.finish == "soft light":
        return out * 0.75 + _blur(np.ascontiguousarray(out), 3.0) * 0.35
    if r.finish == "vignette":
        return out * (1.1 - 0.9 * ((x - SIZE / 2) ** 2 + (y - SIZE / 2) ** 2) / SIZE**2)[..., None]
    if r.finish == "paper":
        return out * (0.95 + 0.05 * noise(23, 3) + 0.03 * noise(24, 14))[..., None]
    if r.finish == "misprinted":
        red, green, blue = (np.ascontiguousarray(out[..., i]) for i in range(3))
        return np.dstack([warp(red, 1.5, 0.0), green, warp(blue, -1.5, 1.0)])
    return out


def draw(number: int, c: Canvas, p: Palette) -> Picture:
    """A canvas in nameless style ``number``."""
    r = recipe(number)
    ground, tones = _ground(r, p), _tones(r, p)
    out, rim = ground, None
    if r.rim != "none" or r.shadow == "cast shadow":
        size = (5 if r.rim != "none" else 1) * SCALE + 1
        rim = cv2.dilate(c.mask, cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (size, size)))
    if r.shadow == "cast shadow" and rim is not None:
        out = out * (1 - 0.35 * warp(rim, -3.0, -4.0))[..., None]
    elif r.shadow == "soft shadow":
        out = out * (1 - 0.4 * _blur(warp(c.mask, -4.0, -5.0), 3.0))[..., None]
    elif r.shadow == "long shadow":
        fall = np.maximum.reduce([warp(c.mask, -float(k), -float(k)) for k in (4, 8, 12, 16, 20)])
        out = out * (1 - 0.25 * fall)[..., None]
    if r.rim != "none" and rim is not None:
        out = _mix(out, _NAMED[r.rim].astype(np.float32), rim)
    out = _mix(out, _body(r, c, tones, ground), c.mask)
    if r.pieces != "none":
        rows, columns, joints = cells(r.pieces, r.piece_size)
        out = out[rows, columns] * (1 - 0.45 * joints)[..., None]
    if r.outline != "none":
        out = _outlined(r, c, out, tones)
    return np.clip(_finished(r, out), 0, 1).astype(np.float32)
