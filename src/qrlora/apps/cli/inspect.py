"""`qrlora inspect`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import rich_click as click

from qrlora.apps.cli.command import Options, command
from qrlora.apps.cli.recorded import referable, shown
from qrlora.apps.cli.shared import PATH

if TYPE_CHECKING:
    from qrlora.method.adapter import Adapter


@command("inspect", "Print what an adapter file is, what it needs, and how large it is")
@click.argument("files", nargs=-1, required=True, type=PATH, metavar="FILE...", help="adapter files")
@click.option("--json", is_flag=True, help="print everything as JSON")
@referable(records=False)
def run_inspect(options: Options) -> None:
    """Print what each file says about itself."""
    from qrlora.models.exchange import load_any

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
            **({"clipped": record["clipped"]} if record["clipped"] else {}),
            **({"null space": f"projection {record['null_space']:g}"} if record["null_space"] else {}),
            "parameters": f"{parameters['trained']:,}; a LoRA of the same rank has {parameters['lora_same_rank']:,} "
            f"(ratio {parameters['ratio']:.4f})",
            "file": f"{record['bytes']:,} bytes",
            "licence": metadata["licence"] or "none given",
            **({"space": _in_space(metadata["provenance"]["space"])} if "space" in metadata["provenance"] else {}),
            "recipe": metadata["recipe_digest"][:16] if metadata["recipe"] else "none",
        }
        print("\n".join([str(record["file"]), *(f"  {key:<11}{value}" for key, value in rows.items())]))


def _in_space(where: Any) -> str:
    """Describe the adapter's point in its space from its provenance, which any program may have written."""
    if not isinstance(where, dict) or not isinstance(where.get("coordinates"), list):
        return "not readable"
    return (
        f"{where.get('name')} ({str(where.get('digest'))[:16]}): {len(where['coordinates'])} coefficients, "
        f"mean {where.get('mean')}, remainder {where.get('remainder')} of ‖ΔR‖²"
    )


def describe(path: Path, adapter: Adapter) -> dict[str, Any]:
    """Return everything that `inspect` prints of one file, as JSON values."""
    from dataclasses import asdict

    from qrlora.method.basis import VERSIONS, clipping

    metadata = adapter.metadata
    count = adapter.parameters()
    basis = "none: the file has its own up matrices"
    if metadata.on_basis:
        current = adapter.basis_version == VERSIONS.get(metadata.algorithm)
        basis = (
            f"{len(metadata.columns)} of {metadata.basis_rank} columns, {metadata.algorithm} version "
            f"{adapter.basis_version or 'unknown'}{'' if current else ', which this qrlora does not make'}, "
            f"fingerprint {metadata.basis_fingerprint[:16]}"
        )
    return {
        "file": shown(path),
        "bytes": path.stat().st_size,
        "layers": len(adapter.deltas),
        "basis": basis,
        "clipped": clipping({name: (len(delta), metadata.rank) for name, delta in adapter.deltas.items()}),
        "null_space": metadata.null_space,
        "parameters": {"trained": count.trained, "lora_same_rank": count.lora_same_rank, "ratio": count.ratio},
        "metadata": asdict(metadata) | {"recipe_digest": metadata.recipe_digest},
        "shapes": {name: list(shape) for name, shape in adapter.shapes.items()},
    }
