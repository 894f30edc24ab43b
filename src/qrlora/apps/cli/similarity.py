"""`qrlora similarity`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import rich_click as click

from qrlora._files import make_folder, write_atomically
from qrlora.apps.cli.command import Options, command
from qrlora.apps.cli.recorded import referable
from qrlora.apps.cli.shared import MODEL_HELP, PATH, bases_of, check_png, claim, json_option, load_adapters
from qrlora.errors import QrloraError


@command(
    "similarity",
    "Compare two adapters: cosines of Q, R, ΔR and ΔW, per layer and in all",
    "Q and R are the base model's: it is loaded for them, unless --files-only.",
)
@click.argument("first", type=PATH, help="adapter file")
@click.argument("second", type=PATH, help="the adapter file to compare it with")
@click.option("--model", help=f"{MODEL_HELP} (default: the one each adapter names)")
@click.option("--files-only", is_flag=True, help="do not load the base model: ΔR and, on one basis, ΔW")
@json_option
@click.option("--plot", type=PATH, metavar="PNG", help="also plot the cosines, layer by layer")
@referable(records=False)
def run_similarity(options: Options) -> None:
    """Print the cosines, and draw them if asked."""
    if options.plot:
        check_png(options.plot)
        make_folder(options.plot.parent)
        claim(options.plot)
    from qrlora.method.composition import similarity

    first, second = load_adapters([options.first, options.second], options.model)
    bases = [None, None] if options.files_only else bases_of(options.model, [first, second])
    found = similarity(first, second, *bases)
    if not found.total:
        raise QrloraError(
            "these two files alone cannot be compared",
            expected="adapters on one basis, or two plain LoRAs",
            got=f"{first.metadata.method} and {second.metadata.method}",
            remedy="leave out --files-only, so that the base model is loaded and ΔW compared",
        )
    if options.plot:
        _plot_similarity(found, options.plot, f"{options.first.stem} and {options.second.stem}")
    if options.json:
        print(json.dumps(found.to_dict(), indent=2))
        return
    width = max(map(len, found.layers))
    print(" " * width + "".join(f"{key:>10}" for key in found.total))
    for name, row in [*found.layers.items(), ("all layers", found.total)]:
        print(f"{name:<{width}}" + "".join(f"{row[key]:>10.4f}" if key in row else " " * 10 for key in found.total))


def _plot_similarity(found: Any, path: Path, title: str) -> None:
    from io import BytesIO

    from matplotlib.figure import Figure

    # A panel each: ΔR and ΔW have the same cosines on one basis, and the curves would hide one another.
    names, symbols = list(found.layers), {"q": "Q", "r": "R", "delta_r": "ΔR", "delta_w": "ΔW", "a": "A", "b": "B"}
    size = (max(6.0, 0.16 * len(names)), 1.0 + 1.6 * len(found.total))
    figure = Figure(figsize=size, layout="constrained")
    panels = figure.subplots(len(found.total), sharex=True, sharey=True, squeeze=False)[:, 0]
    for axes, (key, total) in zip(panels, found.total.items(), strict=True):
        axes.plot([found.layers[name].get(key, float("nan")) for name in names], marker=".")
        axes.axhline(0, color="grey", linewidth=0.5)
        axes.set(ylabel=f"cosine of {symbols[key]}", ylim=(-1.05, 1.05))
        axes.set_title(f"{symbols[key]}: {total:+.4f} in all layers", fontsize="medium", loc="left")
    panels[-1].set_xlabel("layer, in the order of the printed table")
    figure.suptitle(f"Cosine similarity of {title}")
    stream = BytesIO()
    figure.savefig(stream, format="png", dpi=150)
    write_atomically(path, stream.getvalue())
