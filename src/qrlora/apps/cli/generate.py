"""`qrlora generate`."""

from __future__ import annotations

import itertools
import json
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import rich_click as click

from qrlora._files import make_folder, write_all
from qrlora.apps.cli.command import Options, command
from qrlora.apps.cli.keys import c2pa_option, load_certificate
from qrlora.apps.cli.permission import permission_options, permit
from qrlora.apps.cli.recorded import recorder_here, referable, shown
from qrlora.apps.cli.shared import (
    ADAPTER_HELP,
    OVERWRITE_HELP,
    PATH,
    Bar,
    check_null_space,
    check_png,
    claim,
    load_weighted,
    null_space_of,
    null_space_option,
    refuse_to_replace,
    sampling_options,
    say_null_space,
    seed_options,
    seeds_of,
    weighted_path,
    weights,
)
from qrlora.errors import PictureError, QrloraError

if TYPE_CHECKING:
    from qrlora.operations.provenance.certificates import Certificate
    from qrlora.operations.registry import Artifact


@command(
    "generate",
    "Generate pictures from prompts and seeds, with adapters at any weights",
    "One PNG per prompt and seed goes into the folder named by -o; with --grid one labelled PNG. "
    "Each has its prompt, seed and adapters in its metadata. " + OVERWRITE_HELP,
)
@click.option("--prompt", multiple=True, required=True, help="prompt; may be given several times")
@seed_options
@click.option("--adapter", multiple=True, type=weighted_path, metavar="FILE[:WEIGHT]", help=ADAPTER_HELP)
@click.option(
    "--grid",
    type=weights,
    metavar="W,W,...",
    help="with two adapters: one labelled picture of all pairs of these weights, the first adapter's down the rows",
)
@null_space_option
@sampling_options
@permission_options
@c2pa_option
@click.option(
    "-o", "--output", type=PATH, help="folder, or .png for one picture or a grid (default: pictures/ or grid.png)"
)
@referable()
def run_generate(options: Options) -> None:
    """Make the pictures and print where they are."""
    seeds = seeds_of(options)
    if options.grid:
        _check_grid(options, seeds)
    check_null_space(options.null_space, len(options.adapter))
    paths = _picture_paths(options, seeds)
    signer = load_certificate(options.c2pa)
    _claim(options, paths)
    adapters = load_weighted(options.adapter, options.model)
    options.null_space = null_space_of(options.null_space, [adapter for adapter, _ in adapters])
    _permit(options, adapters)
    _say_projected(options, adapters)
    images, failed = _sampled(options, adapters, seeds)
    unsaid = ("output", "c2pa", "policy", "require_approval")
    made = {key: value for key, value in vars(options).items() if key not in unsaid}
    finished = {
        path: described_png(image, made) for path, image in zip(paths, images, strict=True) if image is not None
    }
    origin = _origin(options)
    if signer:
        finished = _marked(finished, options, paths, adapters, signer, origin)
    write_all(finished)
    _record(options, paths, seeds, finished, origin)
    print(*map(shown, finished), sep="\n")
    if failed is not None:
        raise failed


def _sampled(
    options: Options, adapters: Sequence[tuple[Any, float]], seeds: Sequence[int]
) -> tuple[Sequence[Any], PictureError | None]:
    """Return the pictures, None in the place of those whose numbers were not finite, and the error that says so."""
    import torch

    from qrlora.method.composition import project_out
    from qrlora.models.families import load_pipeline
    from qrlora.models.generation import generate, weight_grid

    pipe, family = load_pipeline(options.model, dtype=getattr(torch, options.dtype))
    names = ("steps", "guidance", "resolution")
    common: dict[str, Any] = {**{name: getattr(options, name) for name in names}, "progress": Bar("picture")}
    if options.grid:
        (rows, _), (columns, _) = adapters
        common |= {"row_weights": options.grid, "column_weights": options.grid, "seed": seeds[0]}
        common["null_space"] = options.null_space
        return [weight_grid(pipe, family, options.prompt[0], rows, columns, **common)], None
    common |= {"adapters": project_out(adapters, options.null_space), "batch_size": options.batch_size}
    try:
        return generate(pipe, family, options.prompt, seeds, **common), None
    except PictureError as error:
        return error.images, error


def _permit(options: Options, adapters: Sequence[tuple[Any, float]]) -> None:
    """Ask for permission, for a grid at every pair of weights."""
    paths = [path for path, _ in options.adapter]
    pairs = itertools.product(options.grid, repeat=2) if options.grid else [[weight for _, weight in adapters]]
    for pair in pairs:
        parts = [(adapter, weight) for (adapter, _), weight in zip(adapters, pair, strict=True)]
        permit(options, "generate", paths, parts, options.null_space, options.prompt, options.model)


def _origin(options: Options) -> Artifact | None:
    """Return the artifact that makes the pictures, in the registry in play; add it if it is missing."""
    recorder = recorder_here()
    return recorder.origin(options.adapter, options.null_space, options.model) if recorder else None


def _record(
    options: Options,
    paths: Sequence[Path],
    seeds: Sequence[int],
    finished: Mapping[Path, Any],
    made_by: Artifact | None,
) -> None:
    if (recorder := recorder_here()) and made_by:
        jobs = zip(paths, [(prompt, seed) for prompt in options.prompt for seed in seeds], strict=True)
        settings = {name: getattr(options, name) for name in ("steps", "guidance", "resolution", "grid")}
        made = {path: {"prompt": prompt, "seed": seed, **settings} for path, (prompt, seed) in jobs if path in finished}
        recorder.generated(made, made_by)


def _marked(
    pictures: Mapping[Path, bytes],
    options: Options,
    paths: Sequence[Path],
    adapters: Sequence[Any],
    signer: Certificate,
    made_by: Artifact | None,
) -> dict[Path, bytes]:
    """Add a signed manifest to each picture: prompt, seed, files of the adapters, and the composition's artifact."""
    from qrlora.operations.provenance.c2pa import Origin, mark
    from qrlora.operations.provenance.canonical import known_digest

    digest = made_by.digest if made_by and options.adapter else ""
    named = zip(options.adapter, adapters, strict=True)
    parts = [(path.name, known_digest(path), adapter.metadata) for (path, _), (adapter, _) in named]
    said = [(prompt, seed) for prompt in options.prompt for seed in seeds_of(options)]
    marked = {}
    for path, (prompt, seed) in zip(paths, said, strict=True):
        if path in pictures:
            origin = Origin.of(parts, options.model, prompt, seed, digest, title=path.name)
            marked[path] = mark(pictures[path], origin, signer)
    return marked


def _say_projected(options: Options, adapters: Sequence[tuple[Any, float]]) -> None:
    """Print the projection's strength on stderr; the energy kept only where it is known, on one basis and weights."""
    from qrlora.method.composition import Composition
    from qrlora.method.composition.parts import on_one_basis

    if options.null_space:
        known = not options.grid and on_one_basis([adapter for adapter, _ in adapters])
        kept = Composition(adapters, options.null_space).energy_kept() if known else None
        print(say_null_space(options.null_space, kept), file=sys.stderr)


def _check_grid(options: Options, seeds: Sequence[int]) -> None:
    if len(options.adapter) != 2 or len(options.prompt) != 1 or len(seeds) != 1:
        raise QrloraError(
            "a grid shows two adapters, one prompt and one seed",
            expected="--adapter twice, --prompt once, one seed",
            got=f"{len(options.adapter)} adapters, {len(options.prompt)} prompts, {len(seeds)} seeds",
        )
    if any(weight != 1 for _, weight in options.adapter):
        raise QrloraError(
            "a grid sets the weights of both adapters itself",
            expected="--adapter FILE",
            got=[f"{path}:{weight:g}" for path, weight in options.adapter],
            remedy="leave the weights out, or make single pictures without --grid",
        )


def _picture_paths(options: Options, seeds: Sequence[int]) -> list[Path]:
    """Return the path of each picture, checked before any is sampled."""
    ending = options.output.suffix.lower() if options.output and not options.output.is_dir() else ""
    one_file = ending in (".png", ".jpg", ".jpeg", ".webp")  # a folder may be called v1.5
    if one_file and not options.grid and len(options.prompt) * len(seeds) > 1:
        raise QrloraError(
            "several pictures do not go into one file",
            expected="-o FOLDER",
            got=f"{options.output} for {len(options.prompt) * len(seeds)} pictures",
            remedy="name a folder without an ending, or add --grid to see two adapters in one picture",
        )
    if options.grid or one_file:
        paths = [options.output or Path("grid.png")]
        check_png(paths[0])
    else:
        folder = options.output or Path("pictures")
        paths = [
            picture_file(folder, index, prompt, seed) for index, prompt in enumerate(options.prompt) for seed in seeds
        ]
    for path in paths:
        if options.output is None:
            refuse_to_replace(path)
    return paths


def _claim(options: Options, paths: Sequence[Path]) -> None:
    """Try the file or folder that the pictures go to, and hold it."""
    if options.grid or paths == [options.output]:
        make_folder(paths[0].parent)
        claim(paths[0])
    else:
        least = len(paths) * (options.resolution or 0) ** 2  # bytes: a third of the pixels as they are
        claim(paths[0].parent, least, folder=True)


def picture_file(folder: Path, index: int, prompt: str, seed: int) -> Path:
    """Return the path of the picture of prompt number `number`."""
    return folder / f"{index:02d}-{re.sub(r'[^a-z0-9]+', '-', prompt.lower()).strip('-')[:60]}-seed{seed}.png"


def described_png(image: Any, made: Mapping[str, Any]) -> bytes:
    """Return a PNG with a record of how it was made."""
    from io import BytesIO

    from PIL.PngImagePlugin import PngInfo

    info = PngInfo()
    info.add_itxt("qrlora", json.dumps(made, default=shown, ensure_ascii=False))
    stream = BytesIO()
    image.save(stream, "PNG", pnginfo=info)
    return stream.getvalue()
