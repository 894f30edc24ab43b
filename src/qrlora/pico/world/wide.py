"""The wide world: real and nameless things, in named, nameless and designers' styles, with captions short and long.

It lies round the world of ``qrlora.pico.world`` and changes nothing in it. A scene is a ``Scene``; what the small world
lacks is named by key: a drawing's name (``"accordion"``), ``"thing 12"``, ``"style 231"``, a designer's set
(``"noto"``).

>>> scene = sample(7)
>>> picture, mask = render(scene)
"""

from __future__ import annotations

import hashlib
from dataclasses import replace
from functools import lru_cache

import cv2
import numpy as np
from jaxtyping import Float, UInt8

from qrlora.pico import world
from qrlora.pico.world import Scene, nameless, native, novel
from qrlora.pico.world.canvas import Pose, finished, rasterise, shrink
from qrlora.pico.world.drawings import SEEN_THINGS, SETS, Drawing, variants
from qrlora.pico.world.palette import BACKGROUNDS, COLOURS, palette, rgb

THING_COUNT = 400
"""Shapes without a name; the same number gives the same shape."""
DESIGNERS = tuple(s.name for s in SETS if s.trained)
KINDS = {  # share of the scenes; subject from, style from
    ("small", "small"): 0.26, ("drawn", "named"): 0.25, ("drawn", "nameless"): 0.22, ("hand", "nameless"): 0.09,
    ("drawn", "native"): 0.09, ("shape", "named"): 0.03, ("shape", "nameless"): 0.06,
}  # fmt: skip
_FIRST, _SEED = 6_000_000, 41

DESCRIPTIONS = {
    "flat": ("flat fill", "soft shadow", "no outline"),
    "ink": ("white ground", "bold black outline", "no colours"),
    "pixel": ("square pixels", "dark outline"),
    "halftone": ("dotted fill", "bold black outline"),
    "watercolour": ("paper ground", "fading fill", "no outline"),
    "neon": ("black ground", "glowing outline", "hollow"),
    "blueprint": ("ruled blue ground", "white outline"),
    "stained glass": ("shard pieces", "bold black outline"),
    "engraving": ("cream ground", "ruled fill", "brown lines"),
    "risograph": ("pink and blue", "misprinted", "grainy"),
    "embroidery": ("woven ground", "stitched fill", "corded outline"),
    "clay": ("rounded shading", "soft shadow", "no outline"),
}
"""Descriptions of the named styles for captions; there are none of reserved ones."""


def held_back(subject: str, style: str) -> bool:
    """Return True for pairs that are held back: those of the small world, and a ninth of drawings in named styles."""
    if (subject, style) in _HELD:
        return True
    drawn = subject not in world.SUBJECTS and style in world.SEEN_STYLES
    return drawn and hashlib.sha256(f"{subject}/{style}".encode()).digest()[0] % 9 == 4


_HELD = frozenset(world.HELD_BACK_PAIRS)


# ---------------------------------------------------------------- scenes


def sample(number: int, kind: tuple[str, str] | None = None) -> Scene:
    """Return scene ``number`` of the wide world, without reserved parts and without pairs that are held back."""
    rng = np.random.default_rng((_SEED, number))
    names = list(KINDS)
    drawn = names[rng.choice(len(names), p=np.array(list(KINDS.values())) / sum(KINDS.values()))]
    kind = kind or drawn
    if kind == ("small", "small"):
        return world.sample_scene(_FIRST + number)
    while True:
        subject, style = _subject(rng, kind[0]), _style(rng, kind[1])
        if style in DESIGNERS and not any(d.designer == style for d in variants(subject)):
            style = str(rng.choice(sorted({d.designer for d in variants(subject)})))
        if not held_back(subject, style):
            return posed(rng, Scene(subject, style, "red", "white", _FIRST + number, Pose()))


def posed(rng: np.random.Generator, scene: Scene) -> Scene:
    """The scene with colour, background and place drawn: seven of ten in the middle, the others smaller and aside."""
    near = Pose(rng.uniform(-5, 5), rng.uniform(-4, 4), rng.uniform(-4, 4), rng.uniform(0.90, 1.03))
    scale = rng.uniform(0.55, 0.8)
    reach = 18 * (1 - scale) / 0.3
    far = Pose(rng.uniform(-8, 8), rng.uniform(-reach, reach), rng.uniform(-reach, reach), scale)
    colours, grounds = list(COLOURS), list(BACKGROUNDS)
    return replace(
        scene, colour=colours[rng.integers(len(colours))], background=grounds[rng.integers(len(grounds))],
        pose=near if rng.random() < 0.7 else far,
    )  # fmt: skip


def _subject(rng: np.random.Generator, kind: str) -> str:
    if kind == "shape":
        return f"thing {rng.integers(THING_COUNT)}"
    names = world.SEEN_SUBJECTS if kind == "hand" else SEEN_THINGS
    return str(names[rng.integers(len(names))])


def _style(rng: np.random.Generator, kind: str) -> str:
    if kind == "nameless":
        return f"style {rng.integers(nameless.STYLE_COUNT)}"
    names = DESIGNERS if kind == "native" else world.SEEN_STYLES
    return str(names[rng.integers(len(names))])


# ---------------------------------------------------------------- pictures


def drawing_of(scene: Scene, rng: np.random.Generator) -> Drawing | None:
    """The designer's drawing that a scene shows, if it shows one."""
    of_set = next((s for s in SETS if s.name == scene.style), None)
    choice = variants(scene.subject, trained=of_set is None or of_set.trained)
    if of_set:
        choice = [d for d in choice if d.designer == scene.style]
    elif scene.subject in world.SUBJECTS:
        choice = []
    return choice[rng.integers(len(choice))] if choice else None


def render(scene: Scene) -> tuple[UInt8[np.ndarray, "h w 3"], Float[np.ndarray, "h w"]]:
    """The picture of a scene and the subject's mask; a scene of the small world gives the small world's picture."""
    if scene.subject in world.SUBJECTS and scene.style in world.STYLES:
        return world.render(scene)
    rng = np.random.default_rng(scene.seed)
    drawing = drawing_of(scene, rng)
    if any(s.name == scene.style for s in SETS):
        assert drawing is not None, f"{scene.style} has not drawn {scene.subject}"
        picture, mask = native.draw(drawing, scene.pose, drawing.stretch(rng), rgb(BACKGROUNDS[scene.background]))
        return finished(picture), shrink(mask)
    if drawing:
        parts = drawing.parts(rng)
    elif scene.subject.startswith("thing "):
        parts = novel.thing(np.random.default_rng((_SEED, int(scene.subject[6:]))))
    else:
        parts = world.SUBJECTS[scene.subject](rng)
    canvas, colours = rasterise(parts, scene.pose), palette(scene.colour, scene.background)
    if scene.style.startswith("style "):
        return finished(nameless.draw(int(scene.style[6:]), canvas, colours)), shrink(canvas.mask)
    return finished(world.STYLES[scene.style](canvas, colours)), shrink(canvas.mask)


def render_range(first: int, count: int) -> UInt8[np.ndarray, "n h w 3"]:
    """The pictures of scenes ``first`` to ``first + count``, on one core: for a process of its own."""
    cv2.setNumThreads(1)
    return np.stack([render(sample(number))[0] for number in range(first, first + count)])


# ---------------------------------------------------------------- captions


@lru_cache(maxsize=1)
def _words() -> tuple[str, ...]:
    """Words such as ``<moru>``, in an order that is fixed once: styles take the first, shapes those after them."""
    syllables = [c + v for c in "bdfgklmnprstvz" for v in "aeiou"]
    words = [f"<{a}{b}>" for a in syllables for b in syllables]
    return tuple(words[i] for i in np.random.default_rng(_SEED).permutation(len(words)))


def all_words() -> tuple[str, ...]:
    """The words of all nameless styles and shapes."""
    return _words()[: nameless.STYLE_COUNT + THING_COUNT]


def word(key: str) -> str:
    """The word of a nameless style or thing, the same in every caption."""
    kind, _, number = key.partition(" ")
    return _words()[int(number) + (nameless.STYLE_COUNT if kind == "thing" else 0)]


def spoken(key: str) -> str:
    """Return the words by which a caption names a subject or a style."""
    return word(key) if key.startswith(("style ", "thing ")) else key


def place(pose: Pose) -> list[str]:
    """Describe position and size of a subject."""
    said = ["small"] if pose.scale < 0.7 else []
    if pose.dx <= -8 or pose.dx >= 8:
        said.append("on the left" if pose.dx < 0 else "on the right")
    if pose.dy <= -8 or pose.dy >= 8:
        said.append("at the top" if pose.dy < 0 else "at the bottom")
    return said


def facts(scene: Scene) -> list[str]:
    """Describe the look of a style."""
    if scene.style.startswith("style "):
        return nameless.description(int(scene.style[6:]))
    return list(DESCRIPTIONS.get(scene.style, ()))


def shows_background(scene: Scene) -> bool:
    """Return True if the picture has the scene's background, not one of its style's own."""
    if scene.style.startswith("style "):
        return nameless.recipe(int(scene.style[6:])).level == "own"
    return scene.style in DESIGNERS or (scene.style in world.SEEN_STYLES and scene.style not in world.OWN_GROUND)


def caption(scene: Scene, phrasing: int) -> str:
    """A caption; ``phrasing`` picks its form, its length and what it leaves out. Two of five are short.

    Half of those of a nameless style describe it, and some of these leave its word out.
    """
    rng = np.random.default_rng((scene.seed, phrasing))
    own = scene.style in DESIGNERS  # the designer's colours, not the scene's
    subject = spoken(scene.subject)
    coloured = subject if own or rng.random() < 0.15 else f"{scene.colour} {subject}"
    style, known = spoken(scene.style), facts(scene)
    if rng.random() < 0.4:
        forms = ("a photo of a {0} in {1} style", "a {0} in {1} style", "{1} picture of a {0}", "a {0}, {1} style")
        return str(forms[rng.integers(len(forms))]).format(coloured, style)
    said: list[str] = []
    if known and (not scene.style.startswith("style ") or rng.random() < 0.85):
        count = int(rng.integers(1, min(4, len(known)) + 1))
        said = [known[i] for i in sorted(rng.choice(len(known), count, replace=False))]
    head = ("a photo of a {0} in {1} style", "a {0} in {1} style")[rng.integers(2)].format(coloured, style)
    if len(said) > 1 and rng.random() < 0.3:
        head = f"a {coloured}"
    said += [p for p in place(scene.pose) if rng.random() < 0.8]
    if shows_background(scene) and rng.random() < 0.7:
        said.append(f"{scene.background} background")
    return ", ".join([head, *said])
