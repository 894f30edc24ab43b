"""The loop: what it learns, what it leaves alone, and that an interrupted run ends where an uninterrupted one does."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from qrlora.errors import DataError, MismatchError, ModelError, OutputError, RecipeError, TrainingError, TunerError
from qrlora.method.adapter import Adapter, load_adapter
from qrlora.method.adapter.attach import adapted_layers
from qrlora.method.space import Space, load_space, save_space, unexplained
from qrlora.models.families import load_pipeline
from qrlora.models.generation import generate
from qrlora.models.training import checkpoint, monitor, outputs, placement, prepare
from qrlora.models.training.attach import ADAPTER_NAME, adapter_on
from qrlora.models.training.batches import order
from qrlora.models.training.loop import Progress, TrainingInterrupted, pace, train
from qrlora.models.training.recipe import Recipe


@pytest.fixture
def recipe(tmp_path: Path, tiny_sd3: Path) -> Recipe:
    """Three pictures, so that batches of two straddle epochs."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    for index, colour in enumerate(("red", "green", "blue")):
        Image.radial_gradient("L").convert("RGB").point(lambda v, i=index: (v * (i + 1)) % 256).save(
            folder / f"{colour}.png"
        )
    return Recipe(
        model=str(tiny_sd3),
        role="subject",
        images=folder,
        noun="mug",
        rank=2,
        steps=6,
        batch_size=2,
        learning_rate=0.01,
        output=tmp_path / "mug.safetensors",
    )


def same(one: Adapter, other: Adapter) -> bool:
    return all(torch.equal(one.deltas[name], other.deltas[name]) for name in one.deltas | other.deltas)


@pytest.mark.parametrize("method", ["qrlora", "lora"])
def test_training_lowers_the_loss_and_leaves_the_model_as_it_was(recipe: Recipe, method: str) -> None:
    pipe, family = load_pipeline(recipe.model, device="cpu")
    before = {name: tensor.clone() for name, tensor in pipe.transformer.state_dict().items()}
    losses: list[float] = []
    recipe = recipe.replace(method=method, steps=60, batch_size=8, learning_rate=0.02)
    adapter = train(recipe, pipe=pipe, family=family, progress=lambda p: losses.append(p.loss))
    assert sum(losses[-15:]) < 0.9 * sum(losses[:15])
    after = pipe.transformer.state_dict()
    assert list(after) == list(before) and all(torch.equal(after[name], before[name]) for name in before)
    assert adapter.metadata.method == method and any(delta.any() for delta in adapter.deltas.values())


def test_file_holds_the_adapter_and_the_whole_recipe(recipe: Recipe) -> None:
    adapter = train(recipe)
    assert recipe.output is not None
    loaded = load_adapter(recipe.output)
    metadata = loaded.metadata
    assert same(adapter, loaded)
    assert (metadata.role, metadata.trigger, metadata.family, metadata.rank) == ("subject", "<c>", "sd3", 2)
    assert metadata.columns == (0, 2) and metadata.basis_rank == 4
    assert metadata.recipe == recipe.record() and metadata.recipe_digest == recipe.digest
    assert [picture["name"] for picture in metadata.provenance["pictures"]] == ["blue.png", "green.png", "red.png"]


def test_same_seed_same_adapter(recipe: Recipe) -> None:
    one, two, other = train(recipe), train(recipe), train(recipe.replace(seed=1))
    assert same(one, two) and not same(one, other)


def test_preserving_keeps_what_other_prompts_give(recipe: Recipe) -> None:
    pipe, family = load_pipeline(recipe.model, device="cpu")
    prompt, base = "a blue lamp", []
    recipe = recipe.replace(steps=40, learning_rate=0.05, output=None)
    drift = []
    for changes in ({}, {"preserve": f"{prompt}; ", "preserve_weight": 10.0}):
        adapter = train(recipe.replace(**changes), pipe=pipe, family=family)
        base, changed = (
            np.stack(generate(pipe, family, [prompt], [recipe.seed], adapters=used)).astype(float)
            for used in ([], [(adapter, 1.0)])
        )
        drift.append(np.abs(changed - base).mean())
    assert drift[1] < 0.5 * drift[0]


def test_learning_rate_rises_holds_and_falls(recipe: Recipe) -> None:
    recipe = recipe.replace(steps=10, warmup_steps=2, cooldown_steps=4)
    shares = [pace(recipe, step) for step in range(10)]
    assert shares == [0.5, 1, 1, 1, 1, 1, 1, 0.75, 0.5, 0.25]


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"method": "lora", "warmup_steps": 5, "accumulation": 2},
        {"preserve": "a lamp"},
        {"rank": 20, "alpha": 20, "targets": "all-linear"},  # more columns than some layers hold
    ],
)
def test_resumed_run_is_the_uninterrupted_run_bit_for_bit(recipe: Recipe, changes: dict[str, Any]) -> None:
    recipe = recipe.replace(**changes)
    whole = train(recipe)
    train(recipe.replace(steps=3, checkpoint_every=3))
    resumed = train(recipe, resume=True)
    assert same(whole, resumed)
    if whole.ups:
        assert resumed.ups and all(torch.equal(whole.ups[name], resumed.ups[name]) for name in whole.ups)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_ctrl_c_and_its_kin_save_and_resume(recipe: Recipe, number: signal.Signals) -> None:
    recipe = recipe.replace(cooldown_steps=4)
    whole = train(recipe)
    checkpoints = outputs.folder(recipe)

    def press(progress: Progress) -> None:
        if progress.step == 4:
            os.kill(os.getpid(), number)
            if number != signal.SIGINT:  # a second Ctrl-C is another test's
                os.kill(os.getpid(), number)

    handler = signal.getsignal(number)
    with pytest.raises(TrainingInterrupted, match="after step 4") as interrupt:
        train(recipe, progress=press)
    assert interrupt.value.checkpoint == checkpoints / "step-000004.safetensors"
    assert signal.getsignal(number) is handler
    assert same(whole, train(recipe, resume=True))
    with pytest.raises(TrainingInterrupted, match="nothing saved"):
        train(recipe.replace(output=None), progress=press)


def test_second_ctrl_c_does_not_wait(recipe: Recipe) -> None:
    def press_twice(_: Progress) -> None:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt) as interrupt:
        train(recipe, progress=press_twice)
    assert not isinstance(interrupt.value, TrainingInterrupted)


def test_only_the_newest_checkpoints_are_kept(recipe: Recipe) -> None:
    train(recipe.replace(checkpoint_every=2, checkpoints_kept=2))
    names = sorted(path.name for path in outputs.folder(recipe).iterdir())
    assert names == ["step-000004.safetensors", "step-000006.safetensors"]


def test_another_runs_checkpoints_are_neither_trained_over_nor_removed_unless_it_is_said(recipe: Recipe) -> None:
    train(recipe.replace(checkpoint_every=3, checkpoints_kept=2))
    assert recipe.output is not None
    before = {path: path.read_bytes() for path in [recipe.output, *outputs.folder(recipe).iterdir()]}
    other = recipe.replace(seed=1, steps=2, checkpoint_every=1)
    with pytest.raises(RecipeError, match=r"(?s)earlier run.*step-000006.*--resume.*--restart.*another output"):
        train(other)
    with pytest.raises(ModelError):  # given up only by a run that can begin
        train(other.replace(model=str(recipe.images[0])), restart=True)
    assert {path: path.read_bytes() for path in before} == before
    (outputs.folder(recipe) / "notes.txt").touch()
    assert same(train(other, restart=True), load_adapter(recipe.output))
    assert sorted(path.name for path in outputs.folder(recipe).iterdir()) == ["notes.txt", "step-000002.safetensors"]


def test_a_disk_too_small_is_said_before_the_model_is_loaded(recipe: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    """By a size that is no less than what is written, and not much more."""
    asked: list[int] = []
    monkeypatch.setattr(placement, "check_room", lambda _, size: asked.append(size))
    for changes in ({}, {"method": "lora"}, {"train_basis": True, "columns": "first"}):
        train(recipe.replace(checkpoint_every=3, steps=3, **changes), restart=True)
        assert recipe.output is not None
        adapter, state = recipe.output.stat().st_size, outputs.path_of(recipe, 3).stat().st_size
        assert 0.6 * (adapter + 2 * state) < asked[-1] < 1.1 * (adapter + 2 * state)
    monkeypatch.undo()
    monkeypatch.setattr(prepare, "load_pipeline", lambda *_, **__: pytest.fail("the model is loaded"))
    usage = shutil.disk_usage(recipe.images[0])
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=asked[0] - 1))
    with pytest.raises(OutputError, match=r"no room for .*mug\.safetensors"):
        train(recipe.replace(checkpoint_every=3), restart=True)


def test_a_disk_that_fails_on_the_way_costs_nothing_that_was_trained(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Checkpoints are passed over, and the adapter goes to the cache: a folder deleted, a disk full for good."""
    monkeypatch.setenv("QRLORA_CACHE", str(tmp_path / "cache"))
    whole = train(recipe.replace(output=None))
    folder = tmp_path / "out"
    recipe = recipe.replace(output=folder / "mug.safetensors", checkpoint_every=2)
    replace = os.replace

    def full(source: Any, target: Any) -> None:
        if Path(target).is_relative_to(folder):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        replace(source, target)

    for spoil in (lambda: shutil.rmtree(folder), lambda: monkeypatch.setattr(os, "replace", full)):
        folder.mkdir(exist_ok=True)

        def on_the_way(progress: Progress, spoil: Any = spoil) -> None:
            if progress.step == 3:
                spoil()

        with pytest.raises(OutputError, match=r"cannot write .*mug\.safetensors; it was saved as") as error:
            train(recipe, progress=on_the_way, restart=True)
        assert error.value.saved and same(load_adapter(error.value.saved), whole)
        assert "training goes on without this checkpoint" in caplog.text
        caplog.clear()


def test_an_interrupted_run_without_a_disk_saves_its_checkpoint_elsewhere(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("QRLORA_CACHE", str(tmp_path / "cache"))
    whole, folder = train(recipe.replace(output=None)), tmp_path / "out"
    folder.mkdir()
    recipe = recipe.replace(output=folder / "mug.safetensors")

    def press(progress: Progress) -> None:
        if progress.step == 4:
            shutil.rmtree(folder)
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(OutputError, match=r"step-000004\.safetensors; it was saved as") as error:
        train(recipe, progress=press)
    assert error.value.saved
    outputs.folder(recipe).mkdir(parents=True)
    shutil.move(error.value.saved, outputs.folder(recipe))
    assert same(whole, train(recipe, resume=True))


def test_a_tracker_that_cannot_write_ends_the_run_with_a_checkpoint(
    recipe: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(self: Any, run: Any, *_: Any) -> None:
        if run.step == 2:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "events.out")

    whole = train(recipe.replace(output=None))
    with monkeypatch.context() as patch:
        patch.setattr(monitor.Monitor, "after_step", full)
        with pytest.raises(OutputError, match=r"(?s)stopped after step 2: events.out.*step-000002.*--resume"):
            train(recipe)
    assert same(whole, train(recipe, resume=True))


def test_two_runs_do_not_share_an_output(recipe: Recipe) -> None:
    def second(progress: Progress) -> None:
        refused = []

        def run() -> None:
            with pytest.raises(OutputError, match=f"(?s)another run is writing.*process {os.getpid()}"):
                train(recipe)
            refused.append(True)

        thread = threading.Thread(target=run)
        thread.start()
        thread.join()
        assert refused

    train(recipe.replace(steps=1), progress=second)


@pytest.mark.parametrize("method", ["qrlora", "lora"])
def test_targets_that_match_nothing(recipe: Recipe, method: str) -> None:
    with pytest.raises((RecipeError, TunerError), match="match no layer"):
        train(recipe.replace(method=method, targets="nowhere"))


def test_resume_refuses_another_run_and_a_damaged_checkpoint(recipe: Recipe) -> None:
    with pytest.raises(RecipeError, match="nothing to resume"):
        train(recipe, resume=True)
    train(recipe.replace(checkpoint_every=6))
    with pytest.raises(RecipeError, match=r"(?s)step-000006.* more steps.*got: +5"):
        train(recipe.replace(steps=5), resume=True)
    with pytest.raises(RecipeError, match="another run") as error:
        train(recipe.replace(learning_rate=0.5, rank=1), resume=True)
    assert set(error.value.expected) == {"learning_rate", "learning_rate_several", "rank"}
    Image.new("RGB", (40, 40), "red").save(recipe.images[0] / "more.png")
    with pytest.raises(RecipeError, match="another run"):
        train(recipe, resume=True)
    (recipe.images[0] / "more.png").unlink()
    path = checkpoint.newest(recipe)
    assert path is not None
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(RecipeError, match="damaged checkpoint"):
        train(recipe, resume=True)


def test_breakdown_stops_with_the_step_and_keeps_the_last_good_checkpoint(recipe: Recipe) -> None:
    pipe, _ = load_pipeline(recipe.model, device="cpu")

    def spoil(progress: Progress) -> None:
        if progress.step == 3:
            pipe.transformer.proj_out.weight.data[0, 0] = float("nan")

    with pytest.raises(TrainingError, match="broke down at step 4") as error:
        train(recipe.replace(checkpoint_every=2), pipe=pipe, progress=spoil)
    newest = checkpoint.newest(recipe)
    assert newest is not None and newest.name == "step-000002.safetensors" and newest.name in str(error.value)
    assert recipe.output is not None and not recipe.output.exists()


def test_order_shows_every_example_once_an_epoch() -> None:
    whole = torch.cat([order(3, [0] * 5, 2, number) for number in range(10)])
    assert [sorted(epoch.tolist()) for epoch in whole.view(4, 5)] == [list(range(5))] * 4
    assert len({tuple(epoch.tolist()) for epoch in whole.view(4, 5)}) > 1
    assert torch.equal(order(3, [0] * 5, 3, 4), whole[12:15])  # the batch size cuts one and the same sequence


def test_batches_of_one_bucket_leave_nothing_out() -> None:
    """Against what they are defined by: each epoch's order, walked through with a queue for every bucket."""
    buckets, size, epochs = [0, 1, 0, 0, 2, 1, 0, 1, 0], 2, 12
    queues: dict[int, list[int]] = {0: [], 1: [], 2: []}
    made: list[list[int]] = []
    for epoch in range(epochs):
        for entry in order(5, [0] * len(buckets), len(buckets), epoch).tolist():  # one batch of all: the epoch's order
            queue = queues[buckets[entry]]
            queue.append(entry)
            if len(queue) == size:
                made.append(list(queue))
                queue.clear()
    assert [order(5, buckets, size, number).tolist() for number in range(len(made))] == made
    shown = [entry for batch in made for entry in batch]
    assert {shown.count(entry) for entry in range(len(buckets))} == {epochs}  # 12 of each: no bucket has any waiting
    assert all(len({buckets[entry] for entry in batch}) == 1 for batch in made)
    alone = [order(0, [0, 1], 3, number).tolist() for number in range(2)]  # a picture alone in its bucket fills a batch
    assert sorted(alone) == [[0, 0, 0], [1, 1, 1]]


def of_many_shapes(recipe: Recipe) -> Recipe:
    """The recipe with two more pictures, one of them wide and with a mask of its left half."""
    [folder] = recipe.images
    wide, mask = Image.linear_gradient("L").rotate(90).resize((300, 200)), Image.new("L", (300, 200))
    mask.paste(255, (0, 0, 150, 200))
    wide.convert("RGB").save(folder / "wide.png")
    mask.save(folder / "wide.mask.png")
    wide.transpose(Image.Transpose.ROTATE_90).convert("RGB").save(folder / "tall.png")
    return recipe.replace(buckets=True, flip=True, shift=8, num_repeats=2, accumulation=2)


def test_buckets_masks_flips_and_repeats_resume_bit_for_bit(recipe: Recipe) -> None:
    recipe = of_many_shapes(recipe)
    whole = train(recipe)
    train(recipe.replace(steps=3, checkpoint_every=3))
    assert same(whole, train(recipe, resume=True))
    pictures = whole.metadata.provenance["pictures"]
    assert [p["name"] for p in pictures] == ["blue.png", "green.png", "red.png", "tall.png", "wide.png"]
    assert [p["name"] for p in pictures if "mask_sha256" in p] == ["wide.png"]
    Image.new("L", (300, 200), "white").save(recipe.images[0] / "wide.mask.png")
    with pytest.raises(RecipeError, match="another run"):
        train(recipe, resume=True)


def test_a_mask_changes_what_is_learned_unless_its_background_counts_in_full(recipe: Recipe) -> None:
    recipe = of_many_shapes(recipe).replace(output=None, flip=False)
    none, full, part = (train(recipe.replace(mask_min_value=least)) for least in (0.0, 1.0, 0.5))
    (recipe.images[0] / "wide.mask.png").unlink()
    without = train(recipe)
    assert same(full, without)
    assert not same(none, without) and not same(part, without) and not same(part, none)


def test_a_model_with_a_largest_side_keeps_to_it(recipe: Recipe) -> None:
    recipe = of_many_shapes(recipe).replace(steps=1, output=None)
    with pytest.raises(DataError, match=r"(?s)no pictures of that resolution.*64 at most.*resolution = 64"):
        train(recipe.replace(resolution=68))
    train(recipe.replace(resolution=60))  # its wider buckets would be beyond


def test_finished_run_resumes_to_itself_and_can_be_prolonged(recipe: Recipe) -> None:
    short = train(recipe.replace(steps=3, checkpoint_every=3))
    assert same(short, train(recipe.replace(steps=3), resume=True))
    assert same(train(recipe.replace(output=None)), train(recipe, resume=True))


def test_what_cannot_start(recipe: Recipe, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="nowhere to write"):
        train(recipe.replace(output=tmp_path / "no" / "such" / "a.safetensors"))
    with pytest.raises(ModelError):
        train(recipe.replace(model=str(tmp_path)))


def test_half_precision_base_trains_in_float32(recipe: Recipe) -> None:
    adapter = train(recipe.replace(dtype="bfloat16", steps=2))
    assert all(delta.dtype == torch.float32 for delta in adapter.deltas.values())
    assert any(delta.any() for delta in adapter.deltas.values())


def test_published_mode_and_chosen_targets(recipe: Recipe) -> None:
    adapter = train(recipe.replace(train_basis=True, columns="first", targets=("to_q", "to_k"), steps=2))
    assert adapter.metadata.method == "qrlora_train_basis"
    assert {name.rsplit(".", 1)[1] for name in adapter.deltas} == {"to_q", "to_k"}


@pytest.fixture
def in_space(recipe: Recipe, tmp_path: Path) -> Recipe:
    """A recipe of one picture, in a space of three adapters that were trained on one picture each."""
    pictures = sorted(recipe.images[0].iterdir())
    fields = {"steps": 30, "learning_rate": 0.02, "learning_rate_several": 0.02, "output": None}
    known = [train(recipe.replace(**fields, images=picture)) for picture in pictures]
    save_space(Space.of(known), tmp_path / "three.space.safetensors")
    fields = {"model": recipe.model, "role": "subject", "noun": "mug", "rank": 2, "batch_size": 2, "steps": 6}
    fields |= {"images": pictures[0], "output": tmp_path / "point.safetensors"}
    return Recipe.of(fields | {"space": tmp_path / "three.space.safetensors"})


def test_a_point_of_a_space_is_trained_by_its_coefficients_alone(in_space: Recipe) -> None:
    losses: list[float] = []
    recipe = in_space.replace(steps=60, batch_size=8)
    adapter = train(recipe, progress=lambda p: losses.append(p.loss))
    assert sum(losses[-15:]) < sum(losses[:15])
    space, where = load_space(recipe.space or ""), adapter.metadata.provenance["space"]
    assert where["digest"] == space.digest and where["remainder"] == 0 and len(where["coordinates"]) == space.count
    assert len(json.dumps(where)) < 500
    rebuilt = space.adapter(where["coordinates"], where["mean"])
    assert all(torch.allclose(rebuilt.deltas[name], adapter.deltas[name], atol=1e-5) for name in adapter.deltas)
    assert space.project(load_adapter(recipe.output or "")).unexplained < 1e-8


def test_only_what_coefficients_cannot_follow_is_unexplained(in_space: Recipe) -> None:
    """And looking leaves what trains as it was."""
    pipe, family = load_pipeline(in_space.model, device="cpu")
    space = load_space(in_space.space or "")
    generator = torch.Generator().manual_seed(0)
    with adapter_on(pipe.transformer, family, in_space) as parameters:
        layers = adapted_layers(pipe.transformer, ADAPTER_NAME)
        known = {name: space.components[name][0] + space.mean.deltas[name] for name in layers}
        unknown = {name: torch.randn(part.shape, generator=generator) for name, part in known.items()}

        def along(direction: dict[str, torch.Tensor]) -> Iterator[torch.Tensor]:
            weights = {name: layer.lora_A[ADAPTER_NAME].weight for name, layer in layers.items()}
            yield sum((weights[name] * direction[name]).sum() for name in weights)  # type: ignore[misc]

        assert unexplained(pipe.transformer, lambda: along(known)) == pytest.approx(0, abs=1e-6)
        assert unexplained(pipe.transformer, lambda: along(unknown)) > 0.9
        assert [parameter.numel() for parameter in parameters.values()] == [1 + space.count]
        assert sum(parameter.requires_grad for parameter in pipe.transformer.parameters()) == 1


@pytest.mark.parametrize("remainder", [0.0, 0.1])
def test_a_run_in_a_space_resumes_bit_for_bit(in_space: Recipe, remainder: float) -> None:
    recipe = in_space.replace(space_remainder=remainder)
    whole = train(recipe)
    assert (whole.metadata.provenance["space"]["remainder"] > 0) == (remainder > 0)
    train(recipe.replace(steps=3, checkpoint_every=3))
    moved = in_space.output.with_name("moved.space.safetensors") if in_space.output else Path()
    Path(recipe.space or "").rename(moved)
    assert same(whole, train(recipe.replace(space=moved), resume=True))


def test_a_space_of_something_else_is_refused(in_space: Recipe, tmp_path: Path) -> None:
    for changes, said in (({"rank": 4, "alpha": 4}, "rank"), ({"role": "style", "trigger": "<s>"}, "role")):
        with pytest.raises(MismatchError, match=f"not of one space.*{said}"):
            train(in_space.replace(**changes, columns="first", caption="a [trigger]"))
    for changes, said in (({"method": "lora"}, "frozen basis"), ({"space": None, "space_remainder": 0.1}, "without a")):
        with pytest.raises(RecipeError, match=said):
            in_space.replace(**changes)


def test_the_rate_is_that_of_the_number_of_pictures(recipe: Recipe) -> None:
    fields = {"learning_rate": 0.01, "learning_rate_several": 0.03, "output": None, "steps": 1}
    one = recipe.replace(images=min(recipe.images[0].iterdir()), **fields)
    assert train(recipe.replace(**fields)).metadata.recipe["learning_rate"] == 0.03
    assert train(one).metadata.recipe["learning_rate"] == 0.01
