"""Pictures as PNG files and data URIs."""

from __future__ import annotations

import base64
import io

from PIL import Image


def png_bytes(image: Image.Image) -> bytes:
    """Return the content of a PNG file, compressed as far as zlib goes."""
    stream = io.BytesIO()
    image.save(stream, "PNG", optimize=True)
    return stream.getvalue()


def data_uri(content: bytes, kind: str = "png") -> str:
    """Return the content of a picture file as a URL that an HTML page can embed."""
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"
