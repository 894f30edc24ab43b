"""Drawings of real things by several designers, as parts and tones of pico's world: see NOTICE for whose they are.

>>> "accordion" in THINGS
True
>>> parts = variants("accordion")[0].parts(np.random.default_rng(0))      # as ``shapes.Part``, for any style
"""

from __future__ import annotations

import hashlib
import io
import lzma
from dataclasses import dataclass
from functools import cache, lru_cache
from pathlib import Path

import numpy as np

from qrlora.pico.world.drawings.names import RESERVED
from qrlora.pico.world.shapes import TONES, Part
from qrlora.pico.world.subjects import SEEN_SUBJECTS

DATA = Path(__file__).parent / "drawings.npz.xz"
UNITS = 511
"""Grid units along the longer side of a drawing."""
_SIZE = 1.8  # of a drawing's longer side, in subject units: as the hand-drawn subjects


@dataclass(frozen=True)
class DesignerSet:
    """One designer's icons. trained: whether the base model may see them.

    most: at most about so many things are taken. disc: every icon lies on a disc, which is left out.
    """

    name: str
    package: str
    version: str
    licence: str
    trained: bool = True
    most: int | None = None
    disc: bool = False

    @property
    def archive(self) -> str:
        """The file that ``npm pack`` writes."""
        return f"{self.package.removeprefix('@').replace('/', '-')}-{self.version}.tgz"


SETS = (
    DesignerSet("fluent", "@iconify-json/fluent-emoji-flat", "1.2.6", "MIT"),
    DesignerSet("noto", "@iconify-json/noto", "1.2.9", "Apache-2.0"),
    DesignerSet("twemoji", "@iconify-json/twemoji", "1.2.5", "CC-BY-4.0"),
    DesignerSet("iconpark", "@iconify-json/icon-park", "1.2.4", "Apache-2.0"),
    DesignerSet("kameleon", "@iconify-json/streamline-kameleon-color", "1.2.2", "CC-BY-4.0", disc=True),
    DesignerSet("gradient", "@iconify-json/fluent-emoji", "1.2.7", "MIT", trained=False, most=150),
    DesignerSet("plump", "@iconify-json/streamline-plump-color", "1.2.2", "CC-BY-4.0", trained=False),
)


@dataclass(frozen=True)
class PaintedPart:
    """tone: index into ``TONES``. ends, axis, radial: the designer's paint, see ``svg.Paint``; axis and contours in
    subject units. contours: together, by even-odd."""

    tone: int
    ends: np.ndarray
    axis: np.ndarray | None
    radial: bool
    contours: tuple[np.ndarray, ...]


@dataclass(frozen=True)
class Drawing:
    """One thing as one designer drew it, centred, its longer side ``_SIZE`` units."""

    name: str
    designer: str
    painted: tuple[PaintedPart, ...]

    def stretch(self, rng: np.random.Generator) -> np.ndarray:
        """Slightly other proportions, and its mirror image three times of ten: a factor for (x, y)."""
        factors = rng.uniform(0.92, 1.0, 2)
        factors[0] *= -1 if rng.random() < 0.3 else 1
        return factors

    def parts(self, rng: np.random.Generator) -> list[Part]:
        """The drawing as any style takes it, in slightly other proportions each time."""
        by = self.stretch(rng)
        return [
            Part(part.contours[0] * by, TONES[part.tone], holes=tuple(c * by for c in part.contours[1:]))
            for part in self.painted
        ]


@lru_cache(maxsize=1)
def _arrays() -> dict[str, np.ndarray]:
    with np.load(io.BytesIO(lzma.decompress(DATA.read_bytes()))) as data:
        return {name: data[name] for name in data.files}


@lru_cache(maxsize=1)
def _index() -> tuple[tuple[str, ...], dict[str, list[int]]]:
    """Return all names, and the drawings of each."""
    data = _arrays()
    names = tuple(data["names"].tobytes().decode().split("\n"))
    found: dict[str, list[int]] = {name: [] for name in names}
    for drawing, thing in enumerate(data["thing"]):
        found[names[thing]].append(drawing)
    return names, found


@lru_cache(maxsize=1)
def _starts() -> tuple[np.ndarray, ...]:
    """First part of each drawing, first contour of each part, first point of each contour."""
    data = _arrays()
    return tuple(np.concatenate([[0], np.cumsum(data[k].astype(np.int64))]) for k in ("parts", "contours", "points"))


@cache
def drawing(number: int) -> Drawing:
    """Drawing by its place in the data file."""
    data, (first_part, first_contour, first_point) = _arrays(), _starts()
    painted = []
    for p in range(first_part[number], first_part[number + 1]):
        contours = []
        for c in range(first_contour[p], first_contour[p + 1]):
            span = slice(first_point[c], first_point[c + 1])
            steps = np.stack([data["x"][span], data["y"][span]], 1).astype(np.int64)
            contours.append(_units(np.cumsum(steps, 0)))
        flat = data["axis"][p][0] == -32768
        axis = None if flat else _units(data["axis"][p].reshape(2, 2))
        painted.append(
            PaintedPart(int(data["tone"][p]), data["ends"][p], axis, bool(data["radial"][p]), tuple(contours))
        )
    return Drawing(_index()[0][data["thing"][number]], SETS[data["set"][number]].name, tuple(painted))


def _units(points: np.ndarray) -> np.ndarray:
    """Grid to subject units."""
    return (points / UNITS - 0.5) * _SIZE


def variants(name: str, *, trained: bool = True) -> list[Drawing]:
    """The drawings of a thing by the designers that the base model may see, or by the others."""
    allowed = {i for i, s in enumerate(SETS) if s.trained == trained}
    return [drawing(i) for i in _index()[1].get(name, []) if _arrays()["set"][i] in allowed]


def designers(name: str) -> set[str]:
    """Return the designer sets that have drawn a thing."""
    return {SETS[_arrays()["set"][i]].name for i in _index()[1].get(name, [])}


def _things() -> tuple[str, ...]:
    trained = {i for i, s in enumerate(SETS) if s.trained}
    names, found = _index()
    return tuple(n for n in names if any(_arrays()["set"][i] in trained for i in found[n]))


THINGS = _things()
"""Every name that a set which may be trained on has."""

_DRAWN = sorted(
    (n for n in THINGS if not RESERVED.search(n) and n not in SEEN_SUBJECTS and len(designers(n)) > 2),
    key=lambda n: hashlib.sha256(f"qrlora:{n}".encode()).digest(),
)  # in the order of a hash of the name, so that nobody chose
RESERVED_THINGS = tuple(sorted([n for n in THINGS if RESERVED.search(n)] + _DRAWN[:60]))
"""Kept from the base model, for adapters to learn: the six reserved subjects under every name, and 60 more, the first
by hash of those that at least three designers have drawn."""
SEEN_THINGS = tuple(n for n in THINGS if n not in set(RESERVED_THINGS))
