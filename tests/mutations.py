"""Seeded damage to files: bytes anywhere, values of JSON and TOML, and the headers of safetensors files."""

from __future__ import annotations

import copy
import json
import random
import re
import struct
from collections.abc import Callable, Sequence
from typing import Any

ODD: list[Any] = [
    *(None, True, False, 0, -1, 1, 2, 3.5, 1e308, -0.0, 2**31, 2**63, 10**40, 10**400, float("nan"), float("inf")),
    *("", " ", "x", "1_0", "１", "nan", "\x00", "\ud800", "ä", "../x", "/", "a" * 5000, "[trigger]", "<c>", "first"),
    *([], {}, [[]], [None], {"": None}, ["a", 1], {"a": {"a": {}}}),
]
RAW = [
    *(b"NaN", b"-Infinity", b"1e999", b"9" * 5000, b"[" * 3000, b'{"a":' * 3000, b"a." * 2000),
    *(b"\xef\xbb\xbf", b"\xff", b"\x00", b"\\ud800", b"\xe2\x80\xa8", b"\n", b"\r"),
    *(bytes([byte]) for byte in b"\"'{}[],:=.#-+e9"),
]

Change = Callable[[bytes, random.Random], bytes]


def bytes_changed(data: bytes, rng: random.Random, raw: Sequence[bytes] = ()) -> bytes:
    """One to four changes of single bytes or stretches of them."""
    changed = bytearray(data)
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        at = rng.randrange(len(changed) + 1)
        end = min(len(changed), at + rng.choice((1, 1, 2, 4, 16, 200)))
        kind = rng.randrange(8 if raw else 7)
        if not changed:
            changed += rng.randbytes(4)
        elif kind == 0:
            changed[at % len(changed)] ^= 1 << rng.randrange(8)
        elif kind == 1:
            changed[at:end] = rng.randbytes(end - at)
        elif kind == 2:
            del changed[at:end]
        elif kind == 3:
            changed[at:at] = changed[at:end]
        elif kind == 4:
            del changed[at:]
        elif kind == 5:
            changed[at:at] = rng.randbytes(rng.choice((1, 4)))
        elif kind == 6:
            changed[at:end] = rng.choice((b"\x00", b"\xff", b"\x7f", b"\x80")) * (end - at)
        else:
            changed[at : rng.choice((at, end))] = rng.choice(raw)
    return bytes(changed)


def text_changed(data: bytes, rng: random.Random) -> bytes:
    """As `bytes_changed`, with what means something to parsers of text."""
    return bytes_changed(data, rng, RAW)


def value_changed(value: Any, rng: random.Random) -> Any:
    """One node of a JSON value replaced, removed, renamed or doubled; JSON in its strings likewise."""
    value = copy.deepcopy(value)
    places: list[tuple[Any, Any]] = []
    todo = [value]
    while todo:
        node = todo.pop()
        for key in list(node) if isinstance(node, dict) else range(len(node)) if isinstance(node, list) else ():
            places.append((node, key))
            todo.append(node[key])
    if not places or rng.random() < 0.03:
        return rng.choice(ODD)
    node, key = rng.choice(places)
    inner = node[key]
    kind = rng.randrange(6)
    if isinstance(inner, str) and inner[:1] in "[{" and inner and kind < 4:
        node[key] = json_changed(inner.encode(), rng).decode("utf-8", "replace")
    elif kind == 0 and isinstance(node, dict):
        node[rng.choice(("", "a", "__metadata__", key + "x"))] = node.pop(key)
    elif kind == 1:
        del node[key]
    elif kind == 2 and isinstance(node, list):
        node.append(copy.deepcopy(inner))
    elif kind == 3:
        other, place = rng.choice(places)
        node[key] = copy.deepcopy(other.get(place) if isinstance(other, dict) else other[min(place, len(other) - 1)])
    else:
        node[key] = rng.choice(ODD)
    return value


def json_changed(data: bytes, rng: random.Random) -> bytes:
    """A JSON document with another value somewhere in it, or with other text."""
    if rng.random() < 0.35:
        return text_changed(data, rng)
    return json.dumps(value_changed(json.loads(data), rng)).encode("utf-8", "surrogatepass")


def lines_changed(data: bytes, rng: random.Random) -> bytes:
    """One line of a JSON Lines file."""
    lines = data.split(b"\n")
    place = rng.choice([i for i, line in enumerate(lines) if line.strip()])
    lines[place] = json_changed(lines[place], rng)
    return b"\n".join(lines)


def toml_changed(data: bytes, rng: random.Random) -> bytes:
    """A TOML document with another value or key."""
    found = list(re.finditer(rb"(?m)^(\w+)( = )(.*)$", data))
    if rng.random() < 0.4 or not found:
        return text_changed(data, rng)
    one = rng.choice(found)
    if rng.random() < 0.2:
        return data[: one.start(1)] + rng.choice((b"a.b", b"role.x", b'""', b"[x]", b"rank")) + data[one.end(1) :]
    odd = rng.choice(ODD)
    spelt = json.dumps(odd).replace("NaN", "nan").replace("Infinity", "inf").replace("null", '"null"')
    return data[: one.start(3)] + re.sub(r'("[^"]*"): ', r"\1 = ", spelt).encode() + data[one.end(3) :]


def tensors_changed(data: bytes, rng: random.Random) -> bytes:
    """A safetensors file with another header, or other bytes."""
    if rng.random() < 0.3:
        return bytes_changed(data, rng)
    length = struct.unpack("<Q", data[:8])[0]
    header = data[8 : 8 + length]
    header = json_changed(header.rstrip(), rng) if rng.random() < 0.9 else text_changed(header, rng)
    return struct.pack("<Q", len(header)) + header + data[8 + length :]
