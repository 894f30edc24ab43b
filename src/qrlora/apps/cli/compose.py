"""`qrlora compose`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import rich_click as click

from qrlora.apps.cli.command import Options, command
from qrlora.apps.cli.permission import permit, policy_option
from qrlora.apps.cli.recorded import recorder_here, referable, shown
from qrlora.apps.cli.shared import (
    ADAPTER_HELP,
    COUNT,
    MODEL_HELP,
    OVERWRITE_HELP,
    PATH,
    bases_of,
    check_null_space,
    check_room_for,
    claim,
    json_option,
    load_weighted,
    null_space_of,
    null_space_option,
    refuse_default_output,
    say_null_space,
    weighted_path,
)


@command(
    "compose",
    "Sum adapters that share a basis, exactly, into one file, and print how much they interfere",
    OVERWRITE_HELP,
)
@click.argument("parts", nargs=-1, required=True, type=weighted_path, metavar="FILE[:WEIGHT]...", help=ADAPTER_HELP)
@click.option(
    "-o",
    "--output",
    type=PATH,
    default=Path("composition.safetensors"),
    help="file to write (default: composition.safetensors)",
)
@click.option(
    "--spelling",
    type=click.Choice(["compact", "lora"]),
    default="compact",
    help="form of the file: compact, ΔR alone (default); lora, A and B matrices, which every LoRA loader reads",
)
@click.option(
    "--delta-weights",
    type=COUNT,
    metavar="RANK",
    help="for adapters of different bases, or plain LoRAs: sum ΔW, truncate it to RANK and print what is lost",
)
@null_space_option
@click.option("--model", help=f"{MODEL_HELP} (default: the one the adapters name)")
@policy_option
@json_option
@referable(".safetensors")
def run_compose(options: Options) -> None:
    """Write the composition of the parts, and print their interference or what the truncation lost."""
    refuse_default_output(options, "composition.safetensors")
    claim(options.output)
    from qrlora.method.adapter import save_adapter
    from qrlora.method.composition import Composition, compose_delta_weights

    check_null_space(options.null_space, len(options.parts))
    parts = load_weighted(options.parts, options.model)
    strength = null_space_of(options.null_space, [adapter for adapter, _ in parts])
    permit(options, "compose", [path for path, _ in options.parts], parts, strength)
    if options.delta_weights:
        bases = bases_of(options.model, [adapter for adapter, _ in parts])
        adapter, loss = compose_delta_weights(parts, bases, options.delta_weights, strength)
        report, lines = loss.to_dict(), _truncation_lines(loss, sum(part.metadata.rank for part, _ in parts))
        save_adapter(adapter, options.output, spelling="lora")
    else:
        composition = Composition(parts, strength)
        adapter, interference = composition.adapter(), composition.interference()
        report, lines = interference.to_dict(), _interference_lines(interference)
        if strength:
            report["energy_kept"] = composition.energy_kept()
        check_room_for(options.output, adapter, options.spelling)
        basis = bases_of(options.model, [adapter])[0] if options.spelling == "lora" else None
        save_adapter(adapter, options.output, spelling=options.spelling, basis=basis)
    if strength:
        lines.append(say_null_space(strength, report["energy_kept"]))
    if recorder := recorder_here():
        recorder.composed(options.output, options.parts, strength, options.model)
    if options.json:
        print(json.dumps({"output": shown(options.output), "null_space": strength} | report, indent=2))
    else:
        print(
            "\n".join([*lines, f"{shown(options.output)}: rank {adapter.metadata.rank}, {len(adapter.deltas)} layers"])
        )


def _truncation_lines(loss: Any, exact: int) -> list[str]:
    """Return lines with the whole loss, the three layers that lose most, and the rank that would lose nothing."""
    lines = [f"rank {loss.rank}: {loss.total:.2%} of the sum's energy is lost"]
    if loss.rank < exact:
        worst = sorted(loss.layers.items(), key=lambda item: -item[1])[:3]
        most = ", ".join(f"{layer} ({share:.2%})" for layer, share in worst)
        lines.append(f"  most in {most}; rank {exact} loses nothing")
    if loss.other_weights:
        lines.append(f"  {len(loss.other_weights)} layers were trained on different base weights: look at the pictures")
    return lines


def _interference_lines(interference: Any) -> list[str]:
    """Return lines with the totals, pair by pair, and the three layers that interfere most."""
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
