"""The sample projects of pilots, for the command line and the studio."""

from __future__ import annotations

import importlib.resources
from pathlib import Path

SAMPLES = ("teapots", "icons")


def sample_files(sample: str, line: Path) -> dict[Path, bytes]:
    """Return the files of a sample project, by where they belong if its project file is `line`."""
    source = importlib.resources.files("qrlora.operations") / "pilot" / "samples" / sample
    contents: dict[Path, bytes] = {}
    for name in ("line.toml", "brand.toml", "products.csv", "policy.toml"):
        contents[line if name == "line.toml" else line.parent / name] = (source / name).read_bytes()
    for picture in (source / "pictures").iterdir():
        contents[line.parent / "pictures" / picture.name] = picture.read_bytes()
    return contents
