"""The command line: parse, call, print. Everything heavy is imported by the command that needs it."""

from __future__ import annotations

import argparse
import json
import math
import os
import re
import sys
import time
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qrlora.errors import QrloraError

if TYPE_CHECKING:
    from qrlora.adapter import Adapter
    from qrlora.basis import Basis

ADAPTER_HELP = "adapter file, with a weight if not 1: mug.safetensors:0.9"
OVERWRITE_HELP = "A file named by -o is replaced if it is there; a default name never is."
LESS = "lower --batch-size or --resolution, load the model with --dtype bfloat16, or use a smaller one"
MODEL_HELP = "base model: pico (embedded), a folder in the diffusers layout, or a hub id"

Parsers = Any  # argparse's subparsers action, which has no public type


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code: 0 done, 2 wrong input (said on stderr), 130 interrupted."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    # Libraries announce missing optional parts on import; the user can still ask for that.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
    options = build_parser(arguments).parse_args(arguments)
    try:
        options.run(options)
    except QrloraError as error:
        print(f"qrlora {options.command}: {error}", file=sys.stderr)
        return 2
    except (MemoryError, RuntimeError) as error:
        # What torch raises where memory ends, on a GPU and on a CPU; any other RuntimeError is a fault of this package.
        if isinstance(error, RuntimeError) and not re.search("out of memory|allocate memory", str(error)):
            raise
        print(f"qrlora {options.command}: memory is used up\n  got:      {error}\n  remedy:   " + LESS, file=sys.stderr)
        return 2
    except OSError as error:  # a full disk, a missing right: about the file, so the user's to mend
        print(f"qrlora {options.command}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt as interrupt:
        print(f"\nqrlora {options.command}: {interrupt or 'interrupted'}", file=sys.stderr)
        if getattr(interrupt, "checkpoint", None):
            print("continue with the same command and --resume", file=sys.stderr)
        return 130
    return 0


def build_parser(arguments: Sequence[str] = ()) -> argparse.ArgumentParser:
    """The whole command line. The recipe's flags, which take pydantic to list, only if `arguments` begin with train."""
    parser = argparse.ArgumentParser(
        prog="qrlora",
        description="Learn a subject from one picture, learn a style from one picture, and put them together.",
        epilog="`qrlora COMMAND --help` says more. Begin with `qrlora demo`.",
    )
    parser.add_argument("--version", action="version", version=f"qrlora {version('qrlora')}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    _add_train(commands, with_recipe=list(arguments[:1]) == ["train"])
    _add_compose(commands)
    _add_generate(commands)
    _add_inspect(commands)
    _add_export(commands)
    _add_import(commands)
    _add_extract(commands)
    _add_similarity(commands)
    _add_demo(commands)
    return parser


def _command(
    commands: Parsers, name: str, run: Callable[[argparse.Namespace], None], text: str, epilog: str = ""
) -> Any:
    parser = commands.add_parser(name, help=text, description=text + ".", epilog=epilog)
    parser.set_defaults(run=run)
    return parser


# train


def _add_train(commands: Parsers, with_recipe: bool) -> None:
    parser = _command(
        commands,
        "train",
        run_train,
        "teach an adapter a subject or a style, from a recipe file, from flags, or both",
        "Without --output the file is subject.safetensors or style.safetensors. " + OVERWRITE_HELP,
    )
    if not with_recipe:
        return
    parser.add_argument("recipe", nargs="?", type=Path, help="TOML recipe (see recipes/); flags win over it")
    what = parser.add_mutually_exclusive_group()
    for role in ("subject", "style"):
        what.add_argument(f"--{role}", nargs="+", metavar="IMAGE", help=f"learn a {role} from these pictures or folder")
    what.add_argument("--images", nargs="+", metavar="IMAGE", help="other pictures for the recipe's role")
    parser.add_argument("--resume", action="store_true", help="continue an interrupted run from its newest checkpoint")
    _add_recipe_flags(parser)


def _add_recipe_flags(parser: argparse.ArgumentParser) -> None:
    """One flag per recipe field; values are checked by the recipe."""
    from qrlora.training.recipe import Recipe

    group = parser.add_argument_group("recipe fields")
    for name, field in Recipe.model_fields.items():
        if name in ("role", "images"):
            continue
        flags = [f"--{name.replace('_', '-')}"] + (["-o"] if name == "output" else [])
        text = (field.description or "").replace("%", "%%")
        if not field.is_required() and field.default not in (None, ""):
            text += f" (default: {field.default})"
        if field.annotation is bool:
            group.add_argument(*flags, action=argparse.BooleanOptionalAction, default=None, help=text)
        else:
            group.add_argument(*flags, default=None, metavar=name.upper(), help=text)


def run_train(options: argparse.Namespace) -> None:
    """Train one adapter and say what came of it."""
    from qrlora.training.recipe import Recipe

    fields = {name: getattr(options, name) for name in Recipe.model_fields if getattr(options, name, None) is not None}
    for role in ("subject", "style"):
        if getattr(options, role):
            fields |= {"role": role, "images": getattr(options, role)}
    recipe = Recipe.load(options.recipe, fields) if options.recipe else Recipe.of(fields)
    output = recipe.output or Path(f"{recipe.role}.safetensors")
    if output.is_dir():  # said now, not after the training that would be lost
        raise QrloraError(f"{output} is a folder", expected="-o *.safetensors", got="a folder", remedy="name a file")
    if recipe.output is None and not options.resume:
        _refuse_to_replace(output)
    output.parent.mkdir(parents=True, exist_ok=True)
    recipe = recipe.replace(output=output)
    from qrlora.training.loop import train

    bar = Bar("step")
    adapter = train(
        recipe, progress=lambda p: bar(p.step, p.steps, f"loss {p.loss:.4f}", p.seconds_left), resume=options.resume
    )
    count = adapter.parameters()
    print(
        f"{output}: {count.trained:,} trained parameters, {count.ratio:.3f} of a LoRA of the same rank; "
        f"call it with {recipe.trigger!r}, as in {recipe.text!r}"
    )


# compose


def _add_compose(commands: Parsers) -> None:
    parser = _command(
        commands,
        "compose",
        run_compose,
        "add adapters of one basis, exactly, into one file, and say how much they interfere",
        OVERWRITE_HELP,
    )
    parser.add_argument("parts", nargs="+", metavar="FILE[:WEIGHT]", type=weighted_path, help=ADAPTER_HELP)
    parser.add_argument("-o", "--output", type=Path, default=Path("composition.safetensors"), help="file to write")
    parser.add_argument(
        "--spelling",
        choices=("compact", "lora"),
        default="compact",
        help="compact: ΔR alone (default); lora: reads in every LoRA loader, needs the base model once",
    )
    parser.add_argument(
        "--delta-weights",
        type=count,
        metavar="RANK",
        help="for adapters of different bases, or plain LoRAs: sum ΔW and cut it back to RANK, saying what is lost",
    )
    parser.add_argument("--model", help=f"{MODEL_HELP} (default: the one the adapters name)")
    parser.add_argument("--json", action="store_true", help="print the numbers as JSON")


def run_compose(options: argparse.Namespace) -> None:
    """Write the composition of the parts, and print their interference or what the truncation lost."""
    _refuse_default_output(options, "composition.safetensors")
    from qrlora.adapter import save_adapter
    from qrlora.composition import Composition, compose_delta_weights

    parts = _load(options.parts)
    if options.delta_weights:
        bases = _bases(options.model, [adapter for adapter, _ in parts])
        adapter, loss = compose_delta_weights(parts, bases, options.delta_weights)
        report, lines = loss.to_dict(), _truncation_lines(loss, sum(part.metadata.rank for part, _ in parts))
        save_adapter(adapter, options.output, spelling="lora")
    else:
        composition = Composition(parts)
        adapter, interference = composition.adapter(), composition.interference()
        report, lines = interference.to_dict(), _interference_lines(interference)
        basis = _bases(options.model, [adapter])[0] if options.spelling == "lora" else None
        save_adapter(adapter, options.output, spelling=options.spelling, basis=basis)
    if options.json:
        print(json.dumps({"output": str(options.output)} | report, indent=2))
    else:
        print("\n".join([*lines, f"{options.output}: rank {adapter.metadata.rank}, {len(adapter.deltas)} layers"]))


def _truncation_lines(loss: Any, exact: int) -> list[str]:
    """The whole loss, the three layers that lose most, and the rank that would lose nothing."""
    lines = [f"rank {loss.rank}: {loss.total:.2%} of the sum's energy is lost"]
    if loss.rank < exact:
        worst = sorted(loss.layers.items(), key=lambda item: -item[1])[:3]
        most = ", ".join(f"{layer} ({share:.2%})" for layer, share in worst)
        lines.append(f"  most in {most}; rank {exact} loses nothing")
    if loss.other_weights:
        lines.append(f"  {len(loss.other_weights)} layers were trained on different base weights: look at the pictures")
    return lines


def _interference_lines(interference: Any) -> list[str]:
    """The totals, pair by pair, and the three layers that interfere most."""
    total, lines = interference.total, []
    for i, (name, weight) in enumerate(zip(interference.parts, interference.weights, strict=True)):
        lines.append(f"{name} x {weight:g}: energy {total.energy[i]:.4g}")
        for j in range(i):
            worst = sorted(interference.layers.items(), key=lambda item: -abs(item[1].cosine[i][j]))[:3]
            lines.append(
                f"  with {interference.parts[j]}: cosine of ΔW {total.cosine[i][j]:+.4f}, "
                f"shared row space {total.shared_rows[i][j]:.4f}; most in "
                + ", ".join(f"{layer} ({values.cosine[i][j]:+.3f})" for layer, values in worst)
            )
    lines.append(
        f"together: energy {total.sum_energy:.4g}, {total.sum_energy / max(sum(total.energy), 1e-300):.3f} of "
        "the parts' sum (1: they neither reinforce nor cancel each other)"
    )
    return lines


# generate


def _add_generate(commands: Parsers) -> None:
    parser = _command(
        commands,
        "generate",
        run_generate,
        "make pictures from prompts and seeds, with adapters at any weights",
        "One PNG per prompt and seed goes into the folder named by -o; with --grid one labelled PNG. "
        "Each keeps its prompt, seed and adapters in its metadata. " + OVERWRITE_HELP,
    )
    parser.add_argument("--prompt", action="append", required=True, help="may be given several times")
    parser.add_argument("--seed", action="append", type=seed, help="may be given several times (default: 0)")
    parser.add_argument("--seeds", type=count, metavar="COUNT", help="that many seeds, from --seed on")
    parser.add_argument(
        "--adapter", action="append", default=[], type=weighted_path, metavar="FILE[:WEIGHT]", help=ADAPTER_HELP
    )
    parser.add_argument(
        "--grid",
        type=weights,
        metavar="W,W,...",
        help="with two adapters: one labelled picture of all pairs of these weights, the first adapter's down the rows "
        "(if the first is negative: --grid=-0.5,0,0.5)",
    )
    parser.add_argument("--model", default="pico", help=MODEL_HELP + " (default: pico)")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32", help="of the weights")
    parser.add_argument("--steps", type=count, help="denoising steps (default: the family's)")
    parser.add_argument("--guidance", type=number, help="classifier-free guidance scale (default: the family's)")
    parser.add_argument("--resolution", type=count, help="side of the pictures in pixels (default: the model's)")
    parser.add_argument("--batch-size", type=count, default=8, help="pictures made at once (default: 8)")
    parser.add_argument(
        "-o", "--output", type=Path, help="folder, or .png with --grid (default: pictures/ or grid.png)"
    )


def run_generate(options: argparse.Namespace) -> None:
    """Make the pictures and print where they are."""
    seeds = options.seed or [0]
    if options.seeds:
        seeds = list(range(seeds[0], seeds[0] + options.seeds))
    if options.grid and (len(options.adapter) != 2 or len(options.prompt) != 1 or len(seeds) != 1):
        raise QrloraError(
            "a grid shows two adapters, one prompt and one seed",
            expected="--adapter twice, --prompt once, one seed",
            got=f"{len(options.adapter)} adapters, {len(options.prompt)} prompts, {len(seeds)} seeds",
        )
    if options.grid and any(weight != 1 for _, weight in options.adapter):
        raise QrloraError(
            "a grid sets the weights of both adapters itself",
            expected="--adapter FILE",
            got=[f"{path}:{weight:g}" for path, weight in options.adapter],
            remedy="leave the weights out, or make single pictures without --grid",
        )
    paths = _picture_paths(options, seeds)
    adapters = _load(options.adapter)
    import torch

    from qrlora.families import load_pipeline
    from qrlora.generation import generate, weight_grid

    pipe, family = load_pipeline(options.model, dtype=getattr(torch, options.dtype))
    bar = Bar("picture")
    names = ("steps", "guidance", "resolution")
    common: dict[str, Any] = {**{name: getattr(options, name) for name in names}, "progress": bar}
    if options.grid:
        (rows, _), (columns, _) = adapters
        common |= {"row_weights": options.grid, "column_weights": options.grid, "seed": seeds[0]}
        images = [weight_grid(pipe, family, options.prompt[0], rows, columns, **common)]
    else:
        common |= {"adapters": adapters, "batch_size": options.batch_size}
        images = generate(pipe, family, options.prompt, seeds, **common)
    for path, image in zip(paths, images, strict=True):
        _save_picture(path, image, options)
        print(path)


def _picture_paths(options: argparse.Namespace, seeds: Sequence[int]) -> list[Path]:
    """Where each picture goes, checked before any is made."""
    if options.grid:
        paths = [options.output or Path("grid.png")]
        _check_png(paths[0])
    else:
        folder = options.output or Path("pictures")
        paths = [
            folder / f"{index:02d}-{re.sub(r'[^a-z0-9]+', '-', prompt.lower()).strip('-')[:60]}-seed{seed}.png"
            for index, prompt in enumerate(options.prompt)
            for seed in seeds
        ]
    for path in paths:
        if options.output is None:
            _refuse_to_replace(path)
        path.parent.mkdir(parents=True, exist_ok=True)
    return paths


def _save_picture(path: Path, image: Any, options: argparse.Namespace) -> None:
    """A PNG that says how it was made, written whole or not at all."""
    from io import BytesIO

    from PIL.PngImagePlugin import PngInfo

    from qrlora.files import write_atomically

    made = {key: value for key, value in vars(options).items() if key not in ("run", "output", "command")}
    info = PngInfo()
    info.add_itxt("qrlora", json.dumps(made, default=str, ensure_ascii=False))
    stream = BytesIO()
    image.save(stream, "PNG", pnginfo=info)
    write_atomically(path, stream.getvalue())


# inspect


def _add_inspect(commands: Parsers) -> None:
    parser = _command(
        commands, "inspect", run_inspect, "say what an adapter file is, what it needs, and how large it is"
    )
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE", help="adapter file")
    parser.add_argument("--json", action="store_true", help="print everything as JSON")


def run_inspect(options: argparse.Namespace) -> None:
    """Print what each file says about itself."""
    from qrlora.exchange import load_any

    records = [describe(path, load_any(path)) for path in options.files]
    if options.json:
        print(json.dumps(records if len(records) > 1 else records[0], indent=2, ensure_ascii=False))
        return
    for record in records:
        metadata, parameters = record["metadata"], record["parameters"]
        rows = {
            "what": f"{metadata['role'] or 'adapter'}, method {metadata['method']}, rank {metadata['rank']}, "
            f"{record['layers']} layers",
            "trigger": metadata["trigger"] or "none",
            "needs": f"base model {metadata['base_model'] or 'not recorded'}, family {metadata['family'] or 'unknown'}",
            "basis": record["basis"],
            "parameters": f"{parameters['trained']:,}; a LoRA of the same rank has {parameters['lora_same_rank']:,} "
            f"(ratio {parameters['ratio']:.4f})",
            "file": f"{record['bytes']:,} bytes",
            "licence": metadata["licence"] or "none given",
            "recipe": metadata["recipe_digest"][:16] if metadata["recipe"] else "none",
        }
        print("\n".join([str(record["file"]), *(f"  {key:<11}{value}" for key, value in rows.items())]))


def describe(path: Path, adapter: Adapter) -> dict[str, Any]:
    """Everything `inspect` knows about one file, as JSON values."""
    from dataclasses import asdict

    metadata = adapter.metadata
    count = adapter.parameters()
    basis = "none: it carries its own ups"
    if metadata.on_basis:
        basis = (
            f"{len(metadata.columns)} of {metadata.basis_rank} columns, {metadata.algorithm}, "
            f"fingerprint {metadata.basis_fingerprint[:16]}"
        )
    return {
        "file": str(path),
        "bytes": path.stat().st_size,
        "layers": len(adapter.deltas),
        "basis": basis,
        "parameters": {"trained": count.trained, "lora_same_rank": count.lora_same_rank, "ratio": count.ratio},
        "metadata": asdict(metadata) | {"recipe_digest": metadata.recipe_digest},
        "shapes": {name: list(shape) for name, shape in adapter.shapes.items()},
    }


# export


def _add_export(commands: Parsers) -> None:
    parser = _command(
        commands,
        "export",
        run_export,
        "write an adapter for another program, and count the layers that it will find",
        "Without -o the file is NAME-diffusers.safetensors or NAME-kohya.safetensors. " + OVERWRITE_HELP,
    )
    parser.add_argument("file", type=Path, metavar="FILE", help="adapter file, or anybody's LoRA")
    parser.add_argument(
        "--for",
        dest="program",
        choices=("diffusers", "kohya", "comfyui", "forge", "a1111"),
        default="diffusers",
        help="form, or program: the last three get kohya's for SDXL, else diffusers' (default: diffusers)",
    )
    parser.add_argument("--model", help=f"{MODEL_HELP} (default: the one the adapter names)")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), help="of the file (default: as it is)")
    parser.add_argument("-o", "--output", type=Path, help="file to write")


def run_export(options: argparse.Namespace) -> None:
    """Write the file and print how many of its layers match, by whose rules."""
    import torch

    from qrlora.exchange import export_adapter, load_any, target_of
    from qrlora.families import load_pipeline

    adapter = load_any(options.file)
    pipe, family = load_pipeline(_model_of(adapter, options.model))
    target = target_of(options.program, family.name)
    output = options.output or Path(f"{options.file.stem}-{target}.safetensors")
    if options.output is None:
        _refuse_to_replace(output)
    basis = _basis_in(family.denoiser_of(pipe), adapter)
    dtype = getattr(torch, options.dtype) if options.dtype else None
    export = export_adapter(adapter, output, target, pipe, family, basis=basis, dtype=dtype)
    for program, matched in export.matched.items():
        print(f"by the rules of {program}: {matched} of {export.layers} layers match")
    print(f"{output}: {target} form, rank {adapter.metadata.rank}, {output.stat().st_size:,} bytes")


def _model_of(adapter: Adapter, model: str | None) -> str:
    if not model and not adapter.metadata.base_model:
        raise QrloraError("the file names no base model", expected="--model", got="none", remedy=MODEL_HELP)
    return model or adapter.metadata.base_model


# import


def _add_import(commands: Parsers) -> None:
    parser = _command(
        commands,
        "import",
        run_import,
        "read anybody's LoRA, or a checkpoint of the published QR-LoRA code, as an adapter",
        "Forms: diffusers, PEFT, kohya, published QR-LoRA; safetensors only. The adapter is the file's ΔW exactly, "
        "unless --basis-rank or --like projects it. Without -o the file is NAME-imported.safetensors. "
        + OVERWRITE_HELP,
    )
    parser.add_argument("file", type=Path, metavar="FILE", help="LoRA or checkpoint, .safetensors")
    parser.add_argument("--model", help=f"{MODEL_HELP}; with it every layer is checked, and projection is possible")
    _add_basis_flags(parser)
    parser.add_argument("--like", type=Path, metavar="ADAPTER", help="project onto this adapter's basis and columns")
    parser.add_argument("--alpha", type=float, help="of a file that does not say (default: its rank)")
    parser.add_argument("--without-text-encoder", action="store_true", help="leave a text encoder's layers out")
    parser.add_argument("--role", choices=("subject", "style"), default="", help="what it is about")
    parser.add_argument("--trigger", default="", help="the word that calls it")
    parser.add_argument("-o", "--output", type=Path, help="file to write")
    parser.add_argument("--json", action="store_true", help="print the numbers as JSON")


def _add_basis_flags(parser: Any) -> None:
    parser.add_argument(
        "--basis-rank", type=int, metavar="RANK", help="project onto the base model's basis of this rank"
    )
    parser.add_argument("--columns", default="first", help="columns of it: first, i/n, subject, style (default: all)")
    parser.add_argument("--triangular", action="store_true", help="keep the projected ΔR upper triangular")


def run_import(options: argparse.Namespace) -> None:
    """Write the adapter and print, layer by layer, how much of it a projection kept."""
    from qrlora.adapter import load_adapter, save_adapter
    from qrlora.exchange import Onto, import_file
    from qrlora.families import load_pipeline

    output = options.output or Path(f"{options.file.stem}-imported.safetensors")
    if options.output is None:
        _refuse_to_replace(output)
    like = load_adapter(options.like) if options.like else None
    onto = Onto.like(like) if like else _onto(options)
    model = options.model or (like.metadata.base_model if like else "")
    if onto and not model:
        raise QrloraError("a basis is made of a base model's weights", expected="--model", got="none")
    pipe, family = load_pipeline(model) if model else (None, None)
    adapter, kept = import_file(
        options.file,
        pipe=pipe,
        family=family,
        onto=onto,
        alpha=options.alpha,
        without_text_encoder=options.without_text_encoder,
        base_model=model,
        role=options.role,
        trigger=options.trigger,
    )
    save_adapter(adapter, output, "compact" if adapter.metadata.on_basis else "lora")
    _print_kept(options, output, adapter, kept, {})


def _onto(options: argparse.Namespace) -> Any:
    """The basis that the flags name, or None."""
    from qrlora.exchange import Onto
    from qrlora.tuner.config import least_basis_rank, resolve_columns

    if options.basis_rank is None:
        return None
    rank = options.basis_rank // least_basis_rank(options.columns, 1)
    columns = resolve_columns(options.columns, rank, options.basis_rank)
    return Onto(options.basis_rank, columns, triangular=options.triangular)


def _print_kept(
    options: argparse.Namespace, output: Path, adapter: Adapter, kept: Any, others: dict[str, float]
) -> None:
    meta = adapter.metadata
    if options.json:
        report = {"output": str(output), "kept": kept.to_dict() if kept else None, "others": others}
        print(json.dumps(report, indent=2))
        return
    if kept:
        width = max(map(len, kept.layers))
        print("\n".join(f"{layer:<{width}}  {share:8.4%} of the energy kept" for layer, share in kept.layers.items()))
        print(f"all layers: {kept.total:.4%} kept, {1 - kept.total:.4%} lost")
    else:
        print("ΔW is the file's, unchanged")
    where = f"columns {len(meta.columns)} of a basis of rank {meta.basis_rank}" if meta.on_basis else "beside the basis"
    print(f"{output}: rank {meta.rank}, {len(adapter.deltas)} layers, {where}")


# extract


def _add_extract(commands: Parsers) -> None:
    parser = _command(
        commands,
        "extract",
        run_extract,
        "take the difference between a fine-tuned model and its base as an adapter",
        "Either --rank (a plain LoRA of all linear and convolution layers that differ) or --basis-rank (ΔR on the base "
        "model's basis, of the family's layers). Without -o the file is extracted.safetensors. " + OVERWRITE_HELP,
    )
    parser.add_argument(
        "model", metavar="TUNED", help="the fine-tuned model: a folder in the diffusers layout or hub id"
    )
    parser.add_argument("--base", required=True, help=MODEL_HELP)
    parser.add_argument("--rank", type=int, help="of a plain LoRA: truncated SVD of each layer's difference")
    _add_basis_flags(parser)
    parser.add_argument("--targets", metavar="NAME,NAME", help="layers whose names end in one of these")
    parser.add_argument("--role", choices=("subject", "style"), default="", help="what it is about")
    parser.add_argument("--trigger", default="", help="the word that calls it")
    parser.add_argument("-o", "--output", type=Path, default=Path("extracted.safetensors"), help="file to write")
    parser.add_argument("--json", action="store_true", help="print the numbers as JSON")


def run_extract(options: argparse.Namespace) -> None:
    """Write the adapter; print what of each layer it holds, and what differs that it cannot hold."""
    _refuse_default_output(options, "extracted.safetensors")
    if (options.rank is None) == (options.basis_rank is None):
        raise QrloraError("one way to extract", expected="--rank or --basis-rank", got="both or neither")
    from qrlora.adapter import save_adapter
    from qrlora.adapter.model import base_weights
    from qrlora.basis import Basis
    from qrlora.exchange import changed_components, changed_layers, extract_lora, extract_on_basis
    from qrlora.families import load_pipeline

    onto = _onto(options)
    (base, family), (tuned, other) = load_pipeline(options.base), load_pipeline(options.model)
    if family.name != other.name:
        raise QrloraError("models of two families", expected=family.name, got=other.name)
    targets = options.targets.split(",") if options.targets else family.targets if onto else None
    changes = changed_layers(family.denoiser_of(base), family.denoiser_of(tuned), targets)
    described = {"family": family.name, "denoiser": family.denoiser, "base_model": options.base}
    described |= {"role": options.role, "trigger": options.trigger}
    if onto:
        basis = Basis.of(base_weights(family.denoiser_of(base), changes.layers), onto.rank)
        columns = onto.columns
        adapter, kept = extract_on_basis(changes, basis, columns, triangular=onto.triangular, **described)
    else:
        adapter, kept = extract_lora(changes, options.rank, progress=Bar("layer"), **described)
    save_adapter(adapter, options.output, "compact" if onto else "lora")
    _print_kept(options, options.output, adapter, kept, dict(changes.others))
    parts = changed_components(base, tuned, family.denoiser)
    if parts and not options.json:
        print(f"other parts of the pipeline differ and are not in it: {', '.join(parts)}")
    if changes.others and not options.json:
        named = ", ".join(list(changes.others)[:5]) + (", ..." if len(changes.others) > 5 else "")
        print(f"{len(changes.others)} other parameters of the denoiser differ and are not in it: {named}")


# similarity


def _add_similarity(commands: Parsers) -> None:
    parser = _command(
        commands,
        "similarity",
        run_similarity,
        "compare two adapters: cosines of Q, R, ΔR and ΔW, per layer and in all",
        "Q and R are the base model's: it is loaded for them, unless --files-only.",
    )
    parser.add_argument("first", type=Path)
    parser.add_argument("second", type=Path)
    parser.add_argument("--model", help=f"{MODEL_HELP} (default: the one each adapter names)")
    parser.add_argument("--files-only", action="store_true", help="only what the files alone can tell")
    parser.add_argument("--json", action="store_true", help="print the numbers as JSON")
    parser.add_argument("--plot", type=Path, metavar="PNG", help="also draw them, layer by layer")


def run_similarity(options: argparse.Namespace) -> None:
    """Print the cosines, and draw them if asked."""
    from qrlora.composition import similarity
    from qrlora.exchange import load_any

    if options.plot:
        _check_png(options.plot)
        options.plot.parent.mkdir(parents=True, exist_ok=True)
    first, second = load_any(options.first), load_any(options.second)
    bases = [None, None] if options.files_only else _bases(options.model, [first, second])
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

    from qrlora.files import write_atomically

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


# demo


def _add_demo(commands: Parsers) -> None:
    parser = _command(
        commands,
        "demo",
        run_demo,
        "teach pico a subject and a style from one picture each, put them together, and write a report",
        "With --subject or --style the picture is yours: any photograph, cropped to its square and resized.",
    )
    parser.add_argument("--out", type=Path, default=Path("out/demo"), help="folder of the report (default: out/demo)")
    parser.add_argument("--subject", help="a picture of your own, or the name of a reserved subject of pico's world")
    parser.add_argument("--style", help="a picture of your own, or the name of a reserved style of pico's world")
    parser.add_argument("--seed", type=seed, default=0, help="seed of everything (default: 0)")
    parser.add_argument("--steps", type=count, help="training steps of each adapter (default: the tuned number)")


def run_demo(options: argparse.Namespace) -> None:
    """Run the demo and print where its report is."""
    from qrlora import demo

    chosen = {
        name: getattr(options, name) for name in ("subject", "style", "steps") if getattr(options, name) is not None
    }
    print(demo.run(out=options.out, seed=options.seed, **chosen))


# shared


class Bar:
    """Progress on stderr: one line that rewrites itself on a terminal, every tenth as a line of its own elsewhere."""

    def __init__(self, unit: str):
        self.unit, self.started = unit, time.perf_counter()

    def __call__(self, done: int, of: int, note: str = "", seconds_left: float | None = None) -> None:
        """Say that `done` of `of` units are done; the time left is estimated unless given."""
        if seconds_left is None:
            seconds_left = (time.perf_counter() - self.started) / done * (of - done)
        minutes, seconds = divmod(round(seconds_left), 60)
        text = f"{self.unit} {done}/{of}  {note}{'  ' if note else ''}{minutes}:{seconds:02d} left"
        if sys.stderr.isatty():
            print(f"\r{text}\x1b[K", end="\n" if done == of else "", file=sys.stderr, flush=True)
        elif done == of or done * 10 // of != (done - 1) * 10 // of:
            print(text, file=sys.stderr, flush=True)


def weighted_path(text: str) -> tuple[Path, float]:
    """`file:weight`, or a file alone at weight 1. A colon that is part of the path stays there."""
    path, colon, weight = text.rpartition(":")
    if colon and path and not Path(text).exists():
        try:
            return Path(path), float(weight)
        except ValueError:  # the last colon belongs to the path
            pass
    return Path(text), 1.0


def weights(text: str) -> list[float]:
    """`0,0.5,1` as numbers."""
    return [number(part) for part in text.split(",")]


def number(text: str) -> float:
    """A finite number."""
    return _checked(text, float, "a finite number", math.isfinite)


def count(text: str) -> int:
    """A whole number from 1."""
    return _checked(text, int, "a whole number from 1", lambda value: value >= 1)


def seed(text: str) -> int:
    """A whole number that seeds a torch generator."""
    return _checked(text, int, "a whole number from 0, below 2^63", lambda value: 0 <= value < 2**63)


def _checked(text: str, kind: Callable[[str], Any], expected: str, holds: Callable[[Any], bool]) -> Any:
    """The text as a value, or what argparse prints behind the name of the option."""
    try:
        value = kind(text)
    except ValueError:
        value = None
    if value is None or not holds(value):
        raise argparse.ArgumentTypeError(f"expected {expected}, got {text!r}")
    return value


def _load(parts: Sequence[tuple[Path, float]]) -> list[tuple[Adapter, float]]:
    from qrlora.exchange import load_any

    return [(load_any(path), weight) for path, weight in parts]


def _bases(model: str | None, adapters: Sequence[Adapter]) -> list[Basis | None]:
    """The basis of each adapter that stands on one, from the model asked for or the one it names.

    Where there is but one model, the adapters that stand on none have to fit it too.
    """
    from qrlora.adapter.model import check_fits
    from qrlora.families import load_pipeline

    loaded: dict[str, Any] = {}
    bases: list[Basis | None] = []
    for adapter in adapters:
        metadata = adapter.metadata
        if not metadata.on_basis:
            bases.append(None)
            continue
        source = model or metadata.base_model or "pico"
        if source not in loaded:
            pipe, family = load_pipeline(source)
            loaded[source] = family.denoiser_of(pipe)
        bases.append(_basis_in(loaded[source], adapter))
    if len(loaded) == 1:
        for adapter in adapters:
            if not adapter.metadata.on_basis:
                check_fits(next(iter(loaded.values())), adapter)
    return bases


def _basis_in(denoiser: Any, adapter: Adapter) -> Basis | None:
    """The basis that an adapter stands on, if it does, from this denoiser's weights."""
    from qrlora.adapter.model import base_weights
    from qrlora.basis import Basis

    meta = adapter.metadata
    if not meta.on_basis:
        return None
    weights_of = base_weights(denoiser, adapter.deltas, meta)
    return Basis.of(weights_of, meta.basis_rank, algorithm=meta.algorithm, seed=meta.basis_seed)


def _check_png(path: Path) -> None:
    """Refuse what no PNG can be written to, before time is spent on it."""
    if path.suffix.lower() != ".png" or path.is_dir():
        got = "a folder" if path.is_dir() else path.name
        raise QrloraError(f"no picture can be written to {path}", expected="a file *.png", got=got, remedy="name one")


def _refuse_default_output(options: argparse.Namespace, default: str) -> None:
    if options.output == Path(default):
        _refuse_to_replace(options.output)


def _refuse_to_replace(path: Path) -> None:
    if path.exists():
        raise QrloraError(f"{path} is already there", remedy="name the output with -o (a named file is replaced)")


if __name__ == "__main__":
    raise SystemExit(main())
