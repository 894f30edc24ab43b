"""Make the data file again: ``python -m qrlora.pico.world.drawings.convert FOLDER``.

FOLDER is where ``npm pack`` has put the packages of ``SETS`` (the command prints what is missing). Every icon that
``names`` calls a thing becomes a drawing: parts in painter's order, each with a tone, the designer's paint and its
contours on a grid of ``UNITS``. Needs ``svgelements`` (the ``test`` extra); reading the data does not.
"""

from __future__ import annotations

import colorsys
import io
import json
import lzma
import tarfile
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import click
import cv2
import numpy as np

from qrlora._files import write_atomically
from qrlora.pico.world.drawings import DATA, SETS, UNITS, DesignerSet, names, svg
from qrlora.pico.world.shapes import TONES

MOST_PARTS = 28
_SEEN_AT_LEAST = 90  # samples of GRID x GRID: smaller parts are not seen in a picture of 128 pixels
_LISTED = ("iconpark", "kameleon", "plump")  # sets of no emoji
_TOLERANCE = 1.3  # samples by which a traced contour may be simplified


@dataclass(frozen=True)
class TracedPart:
    """tone: index into ``TONES``. paint: the designer's. contours: (n, 2) int each, on the grid of ``UNITS``."""

    tone: int
    paint: svg.Paint
    contours: list[np.ndarray]


# ---------------------------------------------------------------- packages


def package(folder: Path, source: DesignerSet) -> dict[str, Any]:
    """icons.json of a packed npm package."""
    with tarfile.open(folder / source.archive) as archive:
        return dict(json.load(_member(archive, "icons.json")))


def _member(archive: tarfile.TarFile, name: str) -> Any:
    member = archive.extractfile(f"package/{name}")
    assert member is not None, name
    return member


def things_of(folder: Path, source: DesignerSet, emoji: set[str]) -> dict[str, str]:
    """icon: name, of all icons of a set that are things."""
    if source.name in _LISTED:
        return names.listed(source.name)
    called = {icon: names.of_emoji(icon) for icon in sorted(emoji)}
    return {icon: name for icon, name in called.items() if name}


def emoji_of(folder: Path) -> set[str]:
    """Icons of the emoji sets in the categories that hold things."""
    found: set[str] = set()
    for source in SETS:
        with tarfile.open(folder / source.archive) as archive:
            if source.name not in _LISTED and "package/metadata.json" in archive.getnames():
                known = json.load(_member(archive, "metadata.json")).get("categories", {})
                found |= {icon for category in names.CATEGORIES for icon in known.get(category, [])}
    return found


# ---------------------------------------------------------------- one icon


def trace(body: str, width: float, height: float, disc: bool = False) -> list[TracedPart]:
    """The parts of one icon, moved and scaled to fill the grid; what later parts hide is not a part.

    disc: the first shape is a disc behind the thing, and left out.
    """
    found = svg.areas(body, width, height)[int(disc) :]
    if not found:
        return []
    whole = np.maximum.reduce([a.mask for a in found])
    x, y, w, h = cv2.boundingRect(whole)
    place = partial(_place, corner=np.array([x, y]), size=np.array([w, h]))
    kept = _visible(found)
    tones = tones_of([a.paint.mean for a, _ in kept], [n for _, n in kept])
    to_samples = svg.GRID / max(width, height)
    parts = []
    for (area, _), tone in zip(kept, tones, strict=True):
        contours = [place(c) for c in _contours(area.mask)]
        axis = None if area.paint.axis is None else place(area.paint.axis * to_samples)
        if contours:
            parts.append(TracedPart(tone, svg.Paint(area.paint.ends, axis, area.paint.radial), contours))
    return parts


def _place(points: np.ndarray, corner: np.ndarray, size: np.ndarray) -> np.ndarray:
    """Samples to grid units: the drawing centred, its longer side from 0 to ``UNITS``."""
    centred = (points - corner - (size - 1) / 2) / (size.max() - 1) * UNITS + UNITS / 2
    return np.round(centred).astype(np.int32)


def _visible(found: list[svg.Area]) -> list[tuple[svg.Area, int]]:
    """Areas of which enough is left to see, the largest ``MOST_PARTS`` of them, and how many samples that is."""
    above, seen = np.zeros_like(found[0].mask), []
    for area in reversed(found):
        seen.append((area, int((area.mask & ~above & 1).sum())))
        if area.paint.ends[:, 3].min() > 240:  # else what lies below is seen through it
            above |= area.mask
    seen = [(a, n) for a, n in reversed(seen) if n >= _SEEN_AT_LEAST]
    least = sorted((n for _, n in seen), reverse=True)[:MOST_PARTS][-1:] or [0]
    return [(a, n) for a, n in seen if n >= least[0]]


def _contours(mask: np.ndarray) -> Iterator[np.ndarray]:
    """Outlines and holes of a mask, simplified; none that encloses next to nothing."""
    for contour in cv2.findContours(mask, cv2.RETR_CCOMP, cv2.CHAIN_APPROX_NONE)[0]:
        if len(contour) > 8 and cv2.contourArea(contour) > 16:
            yield cv2.approxPolyDP(contour, _TOLERANCE, True)[:, 0].astype(float)


# ---------------------------------------------------------------- tones


def tones_of(colours: list[np.ndarray], weights: list[int]) -> list[int]:
    """A tone for each part's colour (3,) in 0..255: "main" is the hue that covers most, its near neighbours too."""
    kinds = [_kind(c) for c in colours]
    hues = [colorsys.rgb_to_hls(*(c / 255))[:2] for c in colours]
    heavy: dict[int, int] = {}
    for i, weight in enumerate(weights):
        if kinds[i] == "hue":
            key = round(hues[i][0] * 12) % 12
            heavy[key] = heavy.get(key, 0) + weight
    if not heavy:  # nothing but greys: the largest part is "main"
        largest = colours[int(np.argmax(weights))]
        grey = ["main" if np.abs(c - largest).max() < 12 else k for c, k in zip(colours, kinds, strict=True)]
        return [TONES.index(tone) for tone in grey]
    heaviest = max(heavy, key=lambda k: heavy[k])
    of_it = [i for i, kind in enumerate(kinds) if kind == "hue" and round(hues[i][0] * 12) % 12 == heaviest]
    first = max(of_it, key=lambda i: weights[i])
    return [TONES.index(_tone(k, hue, hues[first])) for k, hue in zip(kinds, hues, strict=True)]


def _kind(colour: np.ndarray) -> str:
    r, g, b = colour / 255
    hue, light, _ = colorsys.rgb_to_hls(r, g, b)
    saturation = colorsys.rgb_to_hsv(r, g, b)[1]
    if light < 0.26:
        return "dark"
    if light > 0.88:
        return "light"
    if saturation < 0.22:
        return "metal"
    return "glass" if 0.48 < hue < 0.62 and light > 0.7 else "hue"


def _tone(kind: str, colour: tuple[float, float], main: tuple[float, float]) -> str:
    if kind != "hue":
        return kind
    away = abs(colour[0] - main[0])
    near = min(away, 1 - away) < 0.07 and abs(colour[1] - main[1]) < 0.14
    return "main" if near else "accent"


# ---------------------------------------------------------------- the data file


def packed(drawings: list[tuple[int, str, list[TracedPart]]]) -> bytes:
    """Pack all drawings as a few flat, compressed arrays. Contours are kept as differences from point to point."""
    things = sorted({name for _, name, _ in drawings})
    parts = [part for _, _, drawing in drawings for part in drawing]
    contours = [c for part in parts for c in part.contours]
    steps = [np.diff(c, axis=0, prepend=np.zeros((1, 2), np.int32)).astype(np.int16) for c in contours]
    flat = np.concatenate(steps)
    none = np.full(4, -32768)
    axes = [none if part.paint.axis is None else part.paint.axis.clip(-32767, 32767).ravel() for part in parts]
    arrays: dict[str, Any] = {
        "names": np.frombuffer("\n".join(things).encode(), np.uint8),
        "set": np.array([s for s, _, _ in drawings], np.uint8),
        "thing": np.array([things.index(name) for _, name, _ in drawings], np.uint16),
        "parts": np.array([len(drawing) for _, _, drawing in drawings], np.uint8),
        "tone": np.array([part.tone for part in parts], np.uint8),
        "radial": np.array([part.paint.radial for part in parts], np.uint8),
        "ends": np.array([np.round(part.paint.ends) for part in parts]).astype(np.uint8),
        "axis": np.array(axes, np.int16),
        "contours": np.array([len(part.contours) for part in parts], np.uint8),
        "points": np.array([len(c) for c in contours], np.uint16),
        "x": flat[:, 0].copy(), "y": flat[:, 1].copy(),
    }  # fmt: skip
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)
    return lzma.compress(buffer.getvalue(), preset=9 | lzma.PRESET_EXTREME)


def convert(folder: Path, workers: int = 2) -> list[tuple[int, str, list[TracedPart]]]:
    """Every thing of every set; several drawings of one name in one set stay beside each other."""
    emoji, jobs = emoji_of(folder), []
    for number, source in enumerate(SETS):
        data, things = package(folder, source), things_of(folder, source, emoji)
        icons = [(icon, name) for icon, name in sorted(things.items()) if icon in data["icons"]]
        chosen = icons if source.most is None else icons[:: max(1, len(icons) // source.most)]
        for icon, name in chosen:
            entry = data["icons"][icon]
            size = [float(entry.get(k, data.get(k, 16))) for k in ("width", "height")]
            jobs.append((number, name, entry["body"], *size, source.disc))
    with ProcessPoolExecutor(workers) as pool:
        traced = pool.map(_trace_job, jobs, chunksize=20)
        return [(job[0], job[1], parts) for job, parts in zip(jobs, traced, strict=True) if len(parts) > 0]


def _trace_job(job: tuple[int, str, str, float, float, bool]) -> list[TracedPart]:
    cv2.setNumThreads(1)
    return trace(*job[2:])


@click.command()
@click.argument("folder", type=click.Path(path_type=Path))
@click.option("--target", type=click.Path(path_type=Path), default=DATA, show_default=True)
def main(folder: Path, target: Path) -> None:
    """Convert the archives that npm pack wrote to FOLDER, write the data file, and print how much is in it."""
    if missing := [source for source in SETS if not (folder / source.archive).exists()]:
        wanted = " ".join(f"{source.package}@{source.version}" for source in missing)
        raise click.UsageError(f"{folder} lacks {len(missing)} of {len(SETS)} packages; there: npm pack {wanted}")
    drawings = convert(folder)
    data = packed(drawings)
    write_atomically(target, data)
    for number, source in enumerate(SETS):
        print(f"{source.name:10} {sum(s == number for s, _, _ in drawings):5} drawings")
    print(f"{len({name for _, name, _ in drawings})} things, {len(data)} bytes")


if __name__ == "__main__":
    main()
