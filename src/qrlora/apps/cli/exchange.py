"""`qrlora export`, `import` and `extract`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import rich_click as click

from qrlora.apps.cli.command import Options, command, together
from qrlora.apps.cli.permission import permission_options, permit
from qrlora.apps.cli.recorded import recorder_here, referable, shown
from qrlora.apps.cli.shared import (
    COUNT,
    DTYPE,
    MODEL_HELP,
    NUMBER,
    OVERWRITE_HELP,
    PATH,
    Bar,
    check_room_for,
    claim,
    json_option,
    load_adapters,
    refuse_default_output,
    refuse_to_replace,
    say_left_out,
)
from qrlora.errors import QrloraError

if TYPE_CHECKING:
    from qrlora.method.adapter import Adapter


@command(
    "export",
    "Write an adapter for another program, and check that it will find every layer",
    "Without -o the file is NAME-FORM.safetensors. " + OVERWRITE_HELP,
)
@click.argument("file", type=PATH, metavar="FILE", help="adapter file, or any LoRA")
@click.option(
    "--for",
    "program",
    type=click.Choice(["diffusers", "kohya", "original", "comfyui", "forge", "a1111", "ai-toolkit"]),
    default="diffusers",
    help="form of the file, or the program that will read it: docs/exchange.md has the table (default: diffusers)",
)
@click.option("--model", help=f"{MODEL_HELP} (default: the one the adapter names)")
@click.option("--dtype", type=DTYPE, help="precision of the file (default: unchanged)")
@permission_options
@click.option("-o", "--output", type=PATH, help="file to write")
@referable(".safetensors")
def run_export(options: Options) -> None:
    """Write the file and print how many of its layers match, by whose rules."""
    if options.output:
        claim(options.output)
    import torch

    from qrlora.method.adapter import basis_of
    from qrlora.models.exchange import export_adapter, is_ours, target_of
    from qrlora.models.families import load_pipeline

    if not options.model and not is_ours(options.file):
        raise _no_base_model()
    [adapter] = load_adapters([options.file], options.model)
    permit(options, "export", [options.file], [(adapter, 1.0)])
    if not options.model and not adapter.metadata.base_model:
        raise _no_base_model()
    check_room_for(options.output or Path(options.file.name), adapter, "lora")
    pipe, family = load_pipeline(options.model or adapter.metadata.base_model)
    target = target_of(options.program, family.name)
    output = options.output or Path(f"{options.file.stem}-{target}.safetensors")
    if options.output is None:
        refuse_to_replace(output)
        claim(output)
    basis = basis_of(family.denoiser_of(pipe), adapter)
    dtype = getattr(torch, options.dtype) if options.dtype else None
    export = export_adapter(adapter, output, target, pipe, family, basis=basis, dtype=dtype)
    if recorder := recorder_here():
        recorder.exported(output, options.file, {"form": target, "dtype": options.dtype or "as it was"})
    for program, matched in export.matched.items():
        print(f"by the rules of {program}: {matched} of {export.layers} layers match")
    print(f"{shown(output)}: {target} form, rank {adapter.metadata.rank}, {output.stat().st_size:,} bytes")


def _no_base_model() -> QrloraError:
    return QrloraError("the file names no base model", expected="--model", got="none", remedy=MODEL_HELP)


basis_options = together(
    click.option("--basis-rank", type=COUNT, metavar="RANK", help="project onto the base model's basis of this rank"),
    click.option(
        "--columns",
        default="first",
        help="columns of that basis: first, i/n, subject, style (default: first, that is all)",
    ),
    click.option("--triangular", is_flag=True, help="keep the projected ΔR upper triangular"),
)

description_options = together(
    click.option(
        "--role",
        type=click.Choice(["subject", "style"]),
        callback=lambda _ctx, _param, value: value or "",
        help="role to record in the adapter",
    ),
    click.option("--trigger", default="", help="word that calls the adapter in prompts"),
)


@command(
    "import",
    "Read any LoRA, or a checkpoint of the published QR-LoRA code, as an adapter",
    "Forms: diffusers, PEFT, kohya, published QR-LoRA; safetensors only. The adapter is the file's ΔW exactly, "
    "unless --basis-rank or --like projects it. Without -o the file is NAME-imported.safetensors. " + OVERWRITE_HELP,
)
@click.argument("file", type=PATH, metavar="FILE", help="LoRA or checkpoint, .safetensors")
@click.option("--model", help=f"{MODEL_HELP}; with it every layer is checked, and projection is possible")
@basis_options
@click.option("--like", type=PATH, metavar="ADAPTER", help="project onto this adapter's basis and columns")
@click.option("--alpha", type=NUMBER, help="alpha of a file that does not give it (default: its rank)")
@description_options
@click.option("-o", "--output", type=PATH, help="file to write")
@json_option
@referable(".safetensors")
def run_import(options: Options) -> None:
    """Write the adapter and print, layer by layer, how much of it a projection kept."""
    output = options.output or Path(f"{options.file.stem}-imported.safetensors")
    if options.output is None:
        refuse_to_replace(output)
    projected = options.like or options.basis_rank
    claim(output, 0 if projected or not options.file.is_file() else options.file.stat().st_size)
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
    if recorder := recorder_here():
        recorder.read(output)
    say_left_out(options.file, adapter)
    _print_kept(options, output, adapter, kept, {})


def _onto(options: Options) -> Any:
    """Return the basis that the flags name, or None."""
    from qrlora.method.tuner.config import least_basis_rank, resolve_columns
    from qrlora.models.exchange import Onto

    if options.basis_rank is None:
        return None
    rank = options.basis_rank // least_basis_rank(options.columns, 1)
    columns = resolve_columns(options.columns, rank, options.basis_rank)
    return Onto(options.basis_rank, columns, triangular=options.triangular)


def _print_kept(options: Options, output: Path, adapter: Adapter, kept: Any, others: dict[str, float]) -> None:
    meta = adapter.metadata
    if options.json:
        report = {"output": shown(output), "kept": kept.to_dict() if kept else None, "others": others}
        print(json.dumps(report, indent=2))
        return
    if kept:
        width = max(map(len, kept.layers))
        print("\n".join(f"{layer:<{width}}  {share:8.4%} of the energy kept" for layer, share in kept.layers.items()))
        print(f"all layers: {kept.total:.4%} kept, {1 - kept.total:.4%} lost")
    else:
        print("ΔW is the file's, unchanged")
    where = f"columns {len(meta.columns)} of a basis of rank {meta.basis_rank}" if meta.on_basis else "beside the basis"
    print(f"{shown(output)}: rank {meta.rank}, {len(adapter.deltas)} layers, {where}")


@command(
    "extract",
    "Take the difference between a fine-tuned model and its base as an adapter",
    "Either --rank (a plain LoRA of all linear and convolution layers that differ) or --basis-rank (ΔR on the base "
    "model's basis, of the family's layers). Without -o the file is extracted.safetensors. " + OVERWRITE_HELP,
)
@click.argument("model", metavar="TUNED", help="the fine-tuned model: a folder in the diffusers layout or hub id")
@click.option("--base", required=True, help=MODEL_HELP)
@click.option("--rank", type=COUNT, help="of a plain LoRA: truncated SVD of each layer's difference")
@basis_options
@click.option("--targets", metavar="NAME,NAME", help="layers whose names end in one of these")
@description_options
@click.option("-o", "--output", type=PATH, default=Path("extracted.safetensors"), help="file to write")
@json_option
@referable(".safetensors")
def run_extract(options: Options) -> None:
    """Write the adapter; print what of each layer it holds, and what differs that it cannot hold."""
    refuse_default_output(options, "extracted.safetensors")
    if (options.rank is None) == (options.basis_rank is None):
        raise QrloraError("exactly one rank is needed", expected="--rank or --basis-rank", got="both or neither")
    claim(options.output)
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
    if recorder := recorder_here():
        recorder.read(options.output)
    _print_kept(options, options.output, adapter, kept, dict(changes.others))
    parts = changed_components(base, tuned, family.denoiser)
    if parts and not options.json:
        print(f"other parts of the pipeline differ and are not in it: {', '.join(parts)}")
    if changes.others and not options.json:
        named = ", ".join(list(changes.others)[:5]) + (", ..." if len(changes.others) > 5 else "")
        print(f"{len(changes.others)} other parameters of the denoiser differ and are not in it: {named}")
