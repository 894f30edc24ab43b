"""Several processes: two on the CPU (gloo) learn what one learns, stop together, and share the base model."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import DistributedType
from PIL import Image

import qrlora
from qrlora.errors import RecipeError
from qrlora.method.adapter import Adapter, load_adapter
from qrlora.models.training.loop import train
from qrlora.models.training.processes import check_divisible, share
from qrlora.models.training.recipe import Recipe
from samples import EPS, NETWORK
from tiny_pipelines import build_tiny_qwen_image

JOBS: dict[str, dict[str, Any]] = {
    "rows": {"batch_size": 5},
    "passes": {"batch_size": 1, "accumulation": 3, "preserve": "a lamp"},
    "divided": {"batch_size": 4, "fsdp": True, "gradient_checkpointing": True},
    "lora": {"method": "lora"},
    "unused": {"model": "qwen-image", "resolution": 16},
}
"""How the work is divided: rows of a forward pass, whole passes, with the base divided too, and with layers of which
some get no gradient."""


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory, tiny_sd3: Path) -> tuple[Path, dict[str, Recipe]]:
    """A folder where two processes have done all jobs in one launch, and the recipes by name."""
    folder = tmp_path_factory.mktemp("processes")
    build_tiny_qwen_image().save_pretrained(folder / "qwen-image")
    Image.radial_gradient("L").convert("RGB").save(folder / "mug.png")
    common = {"role": "subject", "images": str(folder / "mug.png"), "noun": "mug", "rank": 2, "steps": 6}
    common |= {"batch_size": 2, "learning_rate": 0.01, "model": str(tiny_sd3)}

    def fields(name: str, changes: dict[str, Any]) -> dict[str, Any]:
        own = common | changes | {"output": str(folder / f"{name}.safetensors")}
        return own | ({"model": str(folder / changes["model"])} if "model" in changes else {})

    jobs = [{"fields": fields(name, changes)} for name, changes in JOBS.items()]
    stopped = fields("stopped", {})
    jobs += [{"fields": stopped, "interrupt": True}, {"fields": stopped, "resume": True}]
    jobs += [{"fields": fields("whole", {})}]
    (folder / "jobs.json").write_text(json.dumps(jobs))
    script = Path(__file__).parents[1] / "processes.py"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script)]
    here = {"PYTHONPATH": str(Path(qrlora.__file__).parents[1]), "QRLORA_CACHE": str(folder / "cache")}
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **here}
    done = subprocess.run([*command, "jobs.json"], cwd=folder, env=environment, capture_output=True, timeout=900)
    assert done.returncode == 0, done.stderr.decode()[-3000:]
    return folder, {Path(job["fields"]["output"]).stem: Recipe.of(job["fields"]) for job in jobs}


def difference(one: Adapter, other: Adapter) -> float:
    """‖ΔW - ΔW'‖ / ‖ΔW‖ over all layers, for adapters of equal Q."""
    pairs = [(one.deltas[name], other.deltas[name]) for name in one.deltas]
    pairs += [(one.ups[name], other.ups[name]) for name in one.ups] if one.ups and other.ups else []
    parts = torch.tensor([[(a - b).norm().item(), a.norm().item()] for a, b in pairs]).norm(dim=0)
    return (parts[0] / parts[1]).item()


@pytest.mark.parametrize("name", JOBS)
def test_two_processes_learn_what_one_learns(work: tuple[Path, dict[str, Recipe]], name: str) -> None:
    """The losses of all steps and the trained ΔR: they differ by the order of sums alone."""
    folder, recipes = work
    losses: list[float] = []
    recipe = recipes[name].replace(output=None, fsdp=False)
    alone = train(recipe, progress=lambda p: losses.append(p.loss))
    together = json.loads((folder / f"{name}.safetensors.losses.json").read_text())
    assert together == pytest.approx(losses, rel=NETWORK * EPS) and len(losses) == recipe.steps
    if name == "unused":
        assert not all(delta.any() for delta in alone.deltas.values())
    shared = load_adapter(folder / f"{name}.safetensors")
    assert shared.metadata.basis_fingerprint == alone.metadata.basis_fingerprint
    assert difference(alone, shared) < NETWORK * EPS


def test_processes_stop_together_save_once_and_resume_bit_for_bit(work: tuple[Path, dict[str, Recipe]]) -> None:
    folder, _ = work
    said = [(folder / f"stopped.safetensors.stopped{rank}").read_text() for rank in range(2)]
    step = int(said[0].split()[0])
    assert said[0] == said[1] and 2 <= step < 6
    assert [path.name for path in (folder / "stopped.checkpoints").iterdir()] == [f"step-{step:06d}.safetensors"]
    resumed, whole = (load_adapter(folder / f"{name}.safetensors") for name in ("stopped", "whole"))
    assert all(torch.equal(resumed.deltas[name], whole.deltas[name]) for name in whole.deltas)


@pytest.mark.parametrize(("batch_size", "accumulation", "processes"), [(8, 1, 2), (1, 4, 4), (2, 3, 2), (3, 2, 4)])
def test_shares_are_the_step_once(tmp_path: Path, batch_size: int, accumulation: int, processes: int) -> None:
    recipe = Recipe.of({"role": "style", "images": "a.png", "batch_size": batch_size, "accumulation": accumulation})
    taken = [
        [(micro, row) for micro in range(accumulation) for row in range(batch_size)[share(recipe, micro, p, processes)]]
        for p in range(processes)
    ]
    whole = [(micro, row) for micro in range(accumulation) for row in range(batch_size)]
    assert [example for part in taken for example in part] == whole
    assert max(map(len, taken)) - min(map(len, taken)) <= 1 and min(map(len, taken)) > 0


@pytest.mark.parametrize(
    ("changes", "processes", "kind", "said"),
    [
        ({}, 9, DistributedType.MULTI_GPU, "more processes than examples"),
        ({"fsdp": True}, 1, DistributedType.NO, "among processes"),
        ({"quantize": "nf4"}, 1, DistributedType.NO, "for good"),
        ({}, 2, DistributedType.FSDP, "fsdp = true in the recipe"),
    ],
)
def test_what_cannot_be_divided(changes: dict[str, Any], processes: int, kind: DistributedType, said: str) -> None:
    recipe = Recipe.of({"role": "style", "images": "a.png", **changes})
    with pytest.raises(RecipeError, match=said):
        check_divisible(recipe, processes, kind.value, given=True)
