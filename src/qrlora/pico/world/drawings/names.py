"""Select the icons that are things, and give the same thing one name in every set.

No faces, people, flags, letters, numbers or symbols. A name is what a caption says: plain words, singular.
"""

from __future__ import annotations

import re
from functools import lru_cache
from pathlib import Path

CATEGORIES = ("Activities", "Animals & Nature", "Food & Drink", "Objects", "Travel & Places")
"""Categories of the emoji sets that hold things."""

_LEFT_OUT = re.compile(
    r"oclock|thirty|-moon-face|sun-with-face|wind-face|-suit$|place-medal|musical-(note|score)|-slash|speaker-|"
    r"globe-with|^cyclone$|e-mail|with-arrow|incoming-|109|^map-of|nazar|hamsa|love-hotel|sparkles|^dizzy|^star$|"
    r"night-with-stars|milky-way|bridge-at-night|cityscape|sunset$|^foggy$|^sunrise|national-park|^motorway$|"
    r"hot-springs|placard|bell-with|^control-knobs|chart-|^hole$|identification|red-dragon|flower-playing|"
    r"construction$|bookmark-tabs|page-|card-index-dividers|^label$|-tray$|pouring|low-battery|^fog$|water-wave|"
    r"sun-behind-(large|small|rain)|landslide|passport|^litter|guide-dog|service-dog|wilted|x-ray|linked-"
)
_LISTS = Path(__file__).parent / "icons.txt"


@lru_cache
def listed(section: str) -> dict[str, str]:
    """icon: name, of one section of icons.txt."""
    lines = _LISTS.read_text().split(f"[{section}]\n")[1].split("\n[")[0].splitlines()
    return {icon.strip(): name.strip() for icon, _, name in (line.partition("=") for line in lines if line)}


def of_emoji(icon: str) -> str | None:
    """The name of an icon of an emoji set, or None if it is no thing."""
    other = listed("emoji")
    if icon not in other and _LEFT_OUT.search(icon):
        return None
    return other.get(icon, icon.replace("-", " ")) or None


RESERVED = re.compile(
    r"\b(teapots?|kettles?|rockets?|space shuttles?|robots?|trophy|trophies|cupcakes?|muffins?|boots?)\b"
)
"""Under every name, the six subjects that are kept from the base model."""
