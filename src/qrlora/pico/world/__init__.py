"""pico's world: things companies sell, in ways pictures are drawn. Deterministic from a seed.

>>> scene = sample_scene(7, subject="mug", style="neon")
>>> picture, mask = render(scene)          # (128, 128, 3) uint8, (128, 128) float32 in [0, 1]
>>> caption(scene)
'a photo of a green mug in neon style'
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from jaxtyping import Float, UInt8

from qrlora.pico.world import novel
from qrlora.pico.world.canvas import SIZE, Pose, finished, rasterise, shrink
from qrlora.pico.world.palette import BACKGROUNDS, COLOURS, palette
from qrlora.pico.world.styles import OWN_GROUND, RESERVED_STYLES, SEEN_STYLES, STYLES
from qrlora.pico.world.subjects import RESERVED_SUBJECTS, SEEN_SUBJECTS, SUBJECTS

__all__ = [
    "BACKGROUNDS", "COLOURS", "HELD_BACK_PAIRS", "RESERVED_STYLES", "RESERVED_SUBJECTS", "SEEN_PAIRS", "SEEN_STYLES",
    "SEEN_SUBJECTS", "SIZE", "STYLES", "SUBJECTS", "Scene", "caption", "render", "sample_novelty",
    "sample_scene",
]  # fmt: skip

HELD_BACK_PAIRS = tuple(
    (subject, style)
    for i, subject in enumerate(SEEN_SUBJECTS)
    for j, style in enumerate(SEEN_STYLES)
    if (2 * i + 5 * j) % 9 == 4
)
"""Pairs of a seen subject and a seen style that pretraining never shows together: a ninth of them, spread evenly."""
SEEN_PAIRS = tuple((s, t) for s in SEEN_SUBJECTS for t in SEEN_STYLES if (s, t) not in set(HELD_BACK_PAIRS))


@dataclass(frozen=True)
class Scene:
    """Everything that decides one picture. ``seed`` fixes the subject's proportions; the pose is explicit.

    An empty subject or style has no name: a shape or a way to draw that only this seed gives (``novel``).
    """

    subject: str
    style: str
    colour: str
    background: str
    seed: int
    pose: Pose


def sample_scene(seed: int, *, subject: str | None = None, style: str | None = None, colour: str | None = None,
                 background: str | None = None) -> Scene:  # fmt: skip
    """A scene drawn from the world: a seen pair unless subject or style is named."""
    rng = np.random.default_rng(seed)
    pair = SEEN_PAIRS[rng.integers(len(SEEN_PAIRS))]
    if subject is not None or style is not None:
        choice = [p for p in SEEN_PAIRS if p[0] == subject or p[1] == style] or [pair]
        pair = choice[rng.integers(len(choice))]
    colours, grounds = list(COLOURS), list(BACKGROUNDS)
    pose = Pose(rng.uniform(-5, 5), rng.uniform(-4, 4), rng.uniform(-4, 4), rng.uniform(0.90, 1.03))
    scene = Scene(
        pair[0], pair[1], colours[rng.integers(len(colours))], grounds[rng.integers(len(grounds))], seed, pose
    )
    named: dict[str, Any] = {"subject": subject, "style": style, "colour": colour, "background": background}
    return replace(scene, **{k: v for k, v in named.items() if v is not None})


def sample_novelty(seed: int) -> Scene:
    """A scene with something nameless in it: three times of five the style, once the subject, once both."""
    kind = seed % 5
    scene = sample_scene(seed)
    return replace(scene, subject="" if kind > 2 else scene.subject, style="" if kind != 3 else scene.style)


def render(scene: Scene) -> tuple[UInt8[np.ndarray, "h w 3"], Float[np.ndarray, "h w"]]:
    """The picture of a scene, and the subject's mask (coverage in [0, 1])."""
    parts = (SUBJECTS[scene.subject] if scene.subject else novel.thing)(np.random.default_rng(scene.seed))
    canvas = rasterise(parts, scene.pose)
    style = STYLES[scene.style] if scene.style else novel.style(scene.seed)
    picture = style(canvas, palette(scene.colour, scene.background))
    return finished(picture), shrink(canvas.mask)


_PHRASES = (
    "a photo of a {colour} {subject} in {style} style",
    "a {colour} {subject} in {style} style",
    "{style} picture of a {colour} {subject}",
    "a {colour} {subject}, {style} style",
    "a photo of a {subject} in {style} style",
    "a photo of a {colour} {subject}",
)


def caption(scene: Scene, phrasing: int = 0) -> str:
    """A caption of a scene; ``phrasing`` picks the wording, odd hundreds name the background where there is one.

    What has no name is called by a word that the seed and the phrasing give.
    """
    wording, rng = phrasing % 100 % len(_PHRASES), np.random.default_rng((scene.seed, phrasing))
    if not scene.style:
        wording %= len(_PHRASES) - 1  # the last does not speak of the style
    subject, style = scene.subject or novel.word(rng), scene.style or novel.word(rng)
    text = _PHRASES[wording].format(colour=scene.colour, subject=subject, style=style)
    named = (phrasing // 100) % 2 == 1 and scene.style and scene.style not in OWN_GROUND
    return f"{text} on a {scene.background} background" if named else text
