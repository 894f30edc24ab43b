"""Follow the lineage of an artifact, its sources and its products, as text and as a picture."""

from __future__ import annotations

import io
from collections.abc import Iterator
from dataclasses import dataclass

from qrlora.operations.registry.records import Artifact, Edge
from qrlora.operations.registry.registry import Registry

MOST = 400
"""Artifacts of a lineage: more are no picture. A base model has thousands of descendants."""


@dataclass(frozen=True)
class Lineage:
    """An artifact with its ancestors and descendants.

    Attributes:
        edges: those between them; `source` was made from, with or by `target`.
        complete: False where there are more than `MOST`.
    """

    start: str
    nodes: dict[str, Artifact]
    edges: list[Edge]
    complete: bool = True


def graph(registry: Registry, start: Artifact) -> Lineage:
    """Return the lineage of an artifact: all ancestors, and all descendants, but not their other ancestors."""
    nodes, edges, complete = {start.digest: start}, dict[tuple[str, str, str, int], Edge](), True
    for into in (False, True):
        front, seen = [start.digest], {start.digest}
        while front:
            digest = front.pop(0)
            for edge in registry.edges(digest, into=into):
                other = edge.source if into else edge.target
                if other not in nodes and len(nodes) >= MOST:
                    complete = False
                    continue
                if other not in nodes:
                    nodes[other] = registry.get(other)
                edges[edge.source, edge.relation, edge.target, edge.position] = edge
                if other not in seen:
                    seen.add(other)
                    front.append(other)
    return Lineage(start.digest, nodes, list(edges.values()), complete)


def lines(lineage: Lineage) -> list[str]:
    """Return the lineage as a tree: ancestors below `made from`, descendants below `used in`."""
    found = [_label(lineage.nodes[lineage.start])]
    for title, into in (("made from", False), ("used in", True)):
        below = list(_tree(lineage, lineage.start, into, "  ", {lineage.start}))
        found += [title, *below] if below else []
    return found + (
        [] if lineage.complete else [f"(more than {MOST}: --json of `registry show` goes on from any of them)"]
    )


def _tree(lineage: Lineage, digest: str, into: bool, indent: str, above: set[str]) -> Iterator[str]:
    near = [edge for edge in lineage.edges if (edge.target if into else edge.source) == digest]
    for number, edge in enumerate(near):
        other = edge.source if into else edge.target
        last = number == len(near) - 1
        yield f"{indent}{'└' if last else '├'} {said(edge)}: {_label(lineage.nodes[other])}"
        if other not in above:
            yield from _tree(lineage, other, into, indent + ("  " if last else "│ "), above | {other})


def said(edge: Edge) -> str:
    """Return the relation with its numbers."""
    weight = "" if edge.weight is None else f" x {edge.weight:g}"
    return edge.relation.replace("_", " ") + weight + (f", null space {edge.null_space:g}" if edge.null_space else "")


def _label(one: Artifact) -> str:
    marks = [one.kind, *one.aliases, *(["deprecated"] if one.deprecated else [])]
    return f"{one.title} ({', '.join(marks)}) {one.digest[:19]}"


def draw(lineage: Lineage) -> bytes:
    """Return the lineage as an SVG that needs no other file: ancestors left, descendants right."""
    import networkx
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    made = networkx.MultiDiGraph()
    made.add_nodes_from(lineage.nodes)
    made.add_edges_from((edge.target, edge.source) for edge in lineage.edges)
    columns = list(networkx.topological_generations(made))
    places = {
        digest: (3.4 * x, (len(column) - 1) / 2 - y)
        for x, column in enumerate(columns)
        for y, digest in enumerate(sorted(column, key=lambda one: (lineage.nodes[one].kind, lineage.nodes[one].title)))
    }
    height = max(map(len, columns))
    figure = Figure(figsize=(max(6.0, 3.2 * len(columns)), max(2.0, 0.9 * height)), layout="constrained")
    axes = figure.add_subplot()
    axes.set_axis_off()
    for edge in lineage.edges:
        (x, y), (x2, y2) = places[edge.source], places[edge.target]
        arrow = {"arrowstyle": "->", "color": "#888888", "shrinkA": 28, "shrinkB": 28}
        axes.annotate("", (x2, y2), (x, y), arrowprops=arrow)
        axes.text((x + x2) / 2, (y + y2) / 2, said(edge), fontsize=6, color="#555555", ha="center", va="bottom")
    for digest, (x, y) in places.items():
        one = lineage.nodes[digest]
        face = "#ffe9b0" if digest == lineage.start else "#f1f1f1" if one.deprecated else "#dcebff"
        text = f"{one.title[:28]}\n{one.kind} {digest[7:15]}"
        box = {"boxstyle": "round", "facecolor": face, "edgecolor": "#666666"}
        axes.text(x, y, text, fontsize=8, ha="center", va="center", bbox=box, parse_math=False)
    axes.set_xlim(-1.7, 3.4 * len(columns) - 1.7)
    axes.set_ylim(-height / 2 - 0.1, height / 2 + 0.1)
    stream = io.BytesIO()
    with rc_context({"svg.hashsalt": "qrlora"}):  # or every picture of the same lineage would be another file
        figure.savefig(stream, format="svg", metadata={"Date": None})
    return stream.getvalue()
