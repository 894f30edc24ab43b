"""`qrlora registry` export, import, gc, verify, index, card."""

from __future__ import annotations

import shutil
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import rich_click as click

from qrlora._files import write_atomically
from qrlora.apps.cli.audit import check_heads, heads_option
from qrlora.apps.cli.command import Options, check_one_of, command, hold
from qrlora.apps.cli.recorded import open_registry
from qrlora.apps.cli.registry_output import (
    REFERENCE_HELP,
    print_artifacts,
    print_json,
    print_table,
    reference_argument,
    registry_options,
)
from qrlora.apps.cli.shared import COUNT, MODEL_HELP, OVERWRITE_HELP, PATH, Bar, claim, refuse_to_replace
from qrlora.errors import RegistryError

if TYPE_CHECKING:
    from qrlora.method.adapter import Adapter
    from qrlora.operations.registry import Artifact, Registry
    from qrlora.operations.registry.effects import Features, Sampler
    from qrlora.operations.registry.hidden import Suspicion

PROBE_SEEDS = 3
model_option = click.option("--model", default="pico", help=MODEL_HELP + " (default: pico)")


@command(
    "export",
    "Write artifacts, and all that they were made from, measured or approved by, as one file for another registry",
    "The same artifacts make the same bytes. " + OVERWRITE_HELP,
)
@click.argument("references", nargs=-1, required=True, metavar="REFERENCE...", help=REFERENCE_HELP)
@click.option("-o", "--output", type=PATH, help="file to write (default: registry.tar)")
@click.option("--to", metavar="mlflow:URI", help="log adapters to MLflow instead, a run each: mlflow:sqlite:///runs.db")
@registry_options
def run_export_bundle(options: Options) -> None:
    """Write the bundle and say what is in it."""
    check_one_of(options, "output", "to")
    if options.to:
        return _log_to_mlflow(options)
    output = options.output or Path("registry.tar")
    if options.output is None:
        refuse_to_replace(output)
    claim(output)
    where = open_registry(options)
    from qrlora.operations.registry.bundle import export_bundle

    manifest = export_bundle(where, options.references, output)
    if options.json:
        print_json({"output": str(output), "artifacts": [item.digest for item in manifest.artifacts]})
    else:
        print(f"{output}: {len(manifest.artifacts)} artifacts, {output.stat().st_size:,} bytes")


def _log_to_mlflow(options: Options) -> None:
    where = open_registry(options)
    from qrlora.operations.registry.tracking import PREFIX, log_adapters

    if not options.to.startswith(PREFIX):
        raise RegistryError("no place to export to", expected=f"{PREFIX}URI", got=options.to)
    runs = log_adapters(where, options.references, options.to.removeprefix(PREFIX))
    print_json({"runs": runs}) if options.json else print(*runs.values(), sep="\n")


@command(
    "import",
    "Take over a file that `qrlora registry export` wrote, or a run that it logged to MLflow: all of it or nothing",
    "Every object is hashed again. No policy, no alias of a name that is here, and nobody's trust come with it; what "
    "is new has the tag `imported`.",
)
@click.argument("file", metavar="FILE|mlflow:URI#RUN", help="bundle, or run of an MLflow tracking store")
@click.option(
    "--prefix", default="imported", help="put before names that already mean another artifact here (default: imported)"
)
@registry_options
def run_import_bundle(options: Options) -> None:
    """Import the bundle; print what came in, under which names, and what was not taken."""
    where = open_registry(options, create=True)
    from qrlora.operations.registry.bundle import import_bundle
    from qrlora.operations.registry.tracking import PREFIX, fetch_bundle

    file, holding = Path(options.file), ""
    if options.file.startswith(PREFIX):
        file, holding = fetch_bundle(options.file, Path(hold(tempfile.TemporaryDirectory())))
    found = import_bundle(where, file, options.prefix, holding=holding)
    if options.json:
        print_json(vars(found))
        return
    print_artifacts([where.get(digest) for digest in found.added])
    for name, here in found.names.items():
        if name != here:
            print(f"{name} is {here} here: the name was taken", file=sys.stderr)
    for line in found.left_out:
        print(f"not taken: {line}", file=sys.stderr)


@command("gc", "List stored files that nothing refers to; with --delete, remove them")
@click.option("--delete", is_flag=True, help="remove them, and temporary files of killed processes")
@registry_options
def run_gc(options: Options) -> None:
    """Print the digests of the bytes."""
    where = open_registry(options)
    from qrlora.operations.registry.upkeep import remove_unreferenced, unreferenced

    found = sorted(remove_unreferenced(where) if options.delete else unreferenced(where))
    if options.json:
        print_json({"unreferenced": found, "deleted": options.delete})
    else:
        print(
            "\n".join(
                [*found, f"{len(found)} {'removed' if options.delete else 'unreferenced; --delete removes them'}"]
            )
        )


@command(
    "verify",
    "Check everything: the database, the audit log's chain, every row against the log, every byte against its digest",
    "The exit code is 1 if anything is wrong.",
)
@click.option("--probe", is_flag=True, help="also compare predictions for unrelated prompts, for hidden triggers")
@model_option
@heads_option
@registry_options
def run_verify(options: Options) -> int:
    """Print every fault, one a line, and up to where the log is signed."""
    where = open_registry(options)
    from qrlora.operations.registry.heads import newest_head
    from qrlora.operations.registry.signatures import trust_of
    from qrlora.operations.registry.upkeep import verify

    check_heads(options.heads)
    faults = verify(where, Bar("object"), options.heads)
    signed = None if faults else newest_head(where, trust_of(where), where.log(), options.heads)
    probed = _probed(where, options) if options.probe and not faults else []
    faults += [fault for one in probed for fault in _faults_of(one)]
    if options.json:
        rows = [{"adapter": one.adapter.digest, "ratios": one.ratios} for one in probed]
        print_json({"faults": faults, "signed": vars(signed) if signed else None, "probed": rows})
    else:
        print("\n".join([*(faults or ["nothing is wrong"]), *([f"audit log: {signed.words}"] if signed else [])]))
    return 1 if faults else 0


def _probed(where: Registry, options: Options) -> list[Suspicion]:
    from qrlora.models.exchange import LayerNames
    from qrlora.models.families import load_pipeline
    from qrlora.operations.registry.hidden import PROMPT, WORDS, Predictor, suspects

    pipe, family = load_pipeline(options.model)
    read = reader_of(where, LayerNames(family, family.denoiser_of(pipe)))
    predictor = Predictor(pipe, family, [PROMPT.format(word) for word in WORDS])
    return suspects(where, of_model(where, options.model), read, predictor, Bar("adapter"))


def _faults_of(one: Suspicion) -> list[str]:
    if not one.ratios:
        return [f"{one.adapter.title} cannot be probed: too few words are left that it does not say it learned"]
    return [
        f"{one.adapter.title} changes {prompt!r} on its own, {one.ratios[prompt]:.2f} times as much as other prompts "
        "that name neither its trigger nor what it learned: a hidden trigger?"
        for prompt in one.suspicious
    ]


def of_model(where: Registry, model: str) -> list[Artifact]:
    """Return the adapters that were trained on this model, or do not say on which."""
    found = where.search(kind="adapter", limit=100_000)
    return [one for one in found if one.facts.get("base_model") in (model, "")]


def sampler_of(where: Registry, model: str, steps: int) -> Sampler:
    """Return what makes pictures with a registered adapter."""
    from qrlora.models.exchange import LayerNames
    from qrlora.models.families import load_pipeline
    from qrlora.models.generation import generate

    pipe, family = load_pipeline(model)
    read = reader_of(where, LayerNames(family, family.denoiser_of(pipe)))

    def sample(adapter: Artifact | None, prompts: Sequence[str], seeds: Sequence[int]) -> Any:
        import numpy as np

        adapters = [(read(adapter), 1.0)] if adapter else []
        images = generate(pipe, family, prompts, seeds, adapters=adapters, steps=steps)
        return np.stack([np.asarray(image.convert("RGB")) for image in images])

    return sample


def reader_of(where: Registry, names: Any) -> Callable[[Artifact], Adapter]:
    """Return what reads a registered adapter, of any program, for the model with these layers."""
    from qrlora.models.exchange import load_any

    def read(adapter: Artifact) -> Adapter:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, "adapter.safetensors")  # programs are told apart by it
            shutil.copyfile(where.path(adapter), path)
            return load_any(path, names=names)

    return read


def features_of(model: str) -> tuple[str, Features]:
    """Return what turns pictures into numbers, and its name: of pico's pictures its judge."""
    if model != "pico":
        from qrlora.operations.registry.effects import plain_features

        return "colours and grey", plain_features
    from qrlora.pico.judge import Judge

    judge = Judge.load()

    def looked(pictures: Any) -> Any:
        import numpy as np

        seen = judge.look(pictures)
        return np.concatenate([seen[part][0].numpy() for part in ("subject", "style")], axis=1)

    return "pico's judge", looked


@command(
    "index",
    "Measure what adapters do to fixed prompts, so that `registry search --like` finds them by it",
    "Each is measured once on a model.",
)
@click.argument(
    "references", nargs=-1, metavar="[REFERENCE...]", help="adapters (default: all that were trained on --model)"
)
@model_option
@click.option("--steps", type=COUNT, default=12, help="denoising steps of a probe (default: 12)")
@registry_options
def run_index(options: Options) -> None:
    """Measure and print direction, strength and consistency."""
    where = open_registry(options)
    from qrlora.operations.registry.effects import PROMPTS, Probe, effects, index

    adapters = [where.get(one) for one in options.references] or of_model(where, options.model)
    name, features = features_of(options.model)
    probe = Probe(options.model, PROMPTS, tuple(range(PROBE_SEEDS)), options.steps, name)
    index(where, adapters, probe, sampler_of(where, options.model, options.steps), features, Bar("adapter"))
    known = effects(where, probe.digest)
    if options.json:
        print_json({"probe": probe.digest, "effects": [dict(known[one.digest]) for one in adapters]})
        return
    rows = [(one.title, *(f"{known[one.digest][key]:.3f}" for key in ("strength", "consistency"))) for one in adapters]
    print_table(("adapter", "strength", "consistency"), rows)


@command("card", "Write the model card of an adapter: licence, base model, training, lineage, measures")
@reference_argument
@click.option("-o", "--output", type=PATH, help="file to write, such as README.md (default: it is printed)")
@registry_options
def run_card(options: Options) -> None:
    """Write or print the card."""
    if options.output:
        claim(options.output)
    where = open_registry(options)
    from qrlora.operations.registry.cards import card

    made = card(where, where.get(options.reference))
    if options.output:
        write_atomically(options.output, made.content.encode())
    if options.json:
        print_json({"data": made.data.to_dict(), "text": made.text})
    else:
        print(options.output or made.content)


COMMANDS = (run_export_bundle, run_import_bundle, run_gc, run_verify, run_index, run_card)
