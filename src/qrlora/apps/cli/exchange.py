"""`qrlora export`, `import` and `extract`."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qrlora.apps.cli.shared import (
    MODEL_HELP,
    OVERWRITE_HELP,
    Bar,
    Parsers,
    check_room_for,
    claim,
    command,
    count,
    load_adapters,
    number,
    refuse_default_output,
    refuse_to_replace,
    say_left_out,
)
from qrlora.errors import QrloraError

if TYPE_CHECKING:
    from qrlora.method.adapter import Adapter


def add_export(commands: Parsers) -> None:
    parser = command(
        commands,
        "export",
        run_export,
        "write an adapter for another program, and count the layers that it will find",
        "Without -o the file is NAME-FORM.safetensors. " + OVERWRITE_HELP,
    )
    parser.add_argument("file", type=Path, metavar="FILE", help="adapter file, or anybody's LoRA")
    parser.add_argument(
        "--for",
        dest="program",
        choices=("diffusers", "kohya", "original", "comfyui", "forge", "a1111", "ai-toolkit"),
        default="diffusers",
        help="form, or program, which gets the form that it reads for this family: docs/exchange.md has the table "
        "(default: diffusers)",
    )
    parser.add_argument("--model", help=f"{MODEL_HELP} (default: the one the adapter names)")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), help="of the file (default: as it is)")
    parser.add_argument("-o", "--output", type=Path, help="file to write")


def run_export(options: argparse.Namespace) -> None:
    """Write the file and print how many of its layers match, by whose rules."""
    if options.output:
        claim(options, options.output)
    import torch

    from qrlora.method.adapter import basis_of
    from qrlora.models.exchange import export_adapter, is_ours, target_of
    from qrlora.models.families import load_pipeline

    if not options.model and not is_ours(options.file):
        raise _no_base_model()
    [adapter] = load_adapters([options.file], options.model)
    if not options.model and not adapter.metadata.base_model:
        raise _no_base_model()
    check_room_for(options.output or Path(options.file.name), adapter, "lora")
    pipe, family = load_pipeline(options.model or adapter.metadata.base_model)
    target = target_of(options.program, family.name)
    output = options.output or Path(f"{options.file.stem}-{target}.safetensors")
    if options.output is None:
        refuse_to_replace(output)
        claim(options, output)
    basis = basis_of(family.denoiser_of(pipe), adapter)
    dtype = getattr(torch, options.dtype) if options.dtype else None
    export = export_adapter(adapter, output, target, pipe, family, basis=basis, dtype=dtype)
    for program, matched in export.matched.items():
        print(f"by the rules of {program}: {matched} of {export.layers} layers match")
    print(f"{output}: {target} form, rank {adapter.metadata.rank}, {output.stat().st_size:,} bytes")


def _no_base_model() -> QrloraError:
    return QrloraError("the file names no base model", expected="--model", got="none", remedy=MODEL_HELP)


def add_import(commands: Parsers) -> None:
    parser = command(
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
    parser.add_argument("--alpha", type=number, help="of a file that does not say (default: its rank)")
    parser.add_argument("--role", choices=("subject", "style"), default="", help="what it is about")
    parser.add_argument("--trigger", default="", help="the word that calls it")
    parser.add_argument("-o", "--output", type=Path, help="file to write")
    parser.add_argument("--json", action="store_true", help="print the numbers as JSON")


def _add_basis_flags(parser: Any) -> None:
    parser.add_argument(
        "--basis-rank", type=count, metavar="RANK", help="project onto the base model's basis of this rank"
    )
    parser.add_argument("--columns", default="first", help="columns of it: first, i/n, subject, style (default: all)")
    parser.add_argument("--triangular", action="store_true", help="keep the projected ΔR upper triangular")


def run_import(options: argparse.Namespace) -> None:
    """Write the adapter and print, layer by layer, how much of it a projection kept."""
    output = options.output or Path(f"{options.file.stem}-imported.safetensors")
    if options.output is None:
        refuse_to_replace(output)
    projected = options.like or options.basis_rank
    claim(options, output, 0 if projected or not options.file.is_file() else options.file.stat().st_size)
    from qrlora.method.adapter import load_adapter, save_adapter
    from qrlora.models.exchange import Onto, import_file
    from qrlora.models.families import load_pipeline

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
        base_model=model,
        role=options.role,
        trigger=options.trigger,
    )
    save_adapter(adapter, output, "compact" if adapter.metadata.on_basis else "lora")
    say_left_out(options.file, adapter)
    _print_kept(options, output, adapter, kept, {})


def _onto(options: argparse.Namespace) -> Any:
    """The basis that the flags name, or None."""
    from qrlora.method.tuner.config import least_basis_rank, resolve_columns
    from qrlora.models.exchange import Onto

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


def add_extract(commands: Parsers) -> None:
    parser = command(
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
    parser.add_argument("--rank", type=count, help="of a plain LoRA: truncated SVD of each layer's difference")
    _add_basis_flags(parser)
    parser.add_argument("--targets", metavar="NAME,NAME", help="layers whose names end in one of these")
    parser.add_argument("--role", choices=("subject", "style"), default="", help="what it is about")
    parser.add_argument("--trigger", default="", help="the word that calls it")
    parser.add_argument("-o", "--output", type=Path, default=Path("extracted.safetensors"), help="file to write")
    parser.add_argument("--json", action="store_true", help="print the numbers as JSON")


def run_extract(options: argparse.Namespace) -> None:
    """Write the adapter; print what of each layer it holds, and what differs that it cannot hold."""
    refuse_default_output(options, "extracted.safetensors")
    if (options.rank is None) == (options.basis_rank is None):
        raise QrloraError("one way to extract", expected="--rank or --basis-rank", got="both or neither")
    claim(options, options.output)
    from qrlora.method.adapter import save_adapter
    from qrlora.method.adapter.attach import base_weights
    from qrlora.method.basis import Basis
    from qrlora.models.exchange import changed_components, changed_layers, extract_lora, extract_on_basis
    from qrlora.models.families import load_pipeline

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
