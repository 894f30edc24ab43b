"""Every method of the comparison: zero at the start, ΔW that does what the attached layers did, a model left alone."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

from denoisers import same, state
from qrlora.errors import RecipeError
from qrlora.lab.baselines.adapters import ADAPTERS, is_target, orthonormal, train_method
from qrlora.lab.baselines.deltas import Delta, Learned, applied, inner
from qrlora.lab.baselines.directions import PASSES
from qrlora.lab.baselines.training import Attached, train_attached
from qrlora.method.basis import cached_layer_basis, weight_digest
from qrlora.models.families import load_pipeline
from qrlora.models.training.loop import train
from qrlora.models.training.recipe import Recipe
from samples import EPS, NETWORK, assert_rounded

RANK = 2
FROZEN_UP = ("mica", "qrlora_dense", "q_random", "q_activation")


@pytest.fixture(scope="module")
def pipe(tiny_sd3: Path) -> Any:
    return load_pipeline(tiny_sd3, device="cpu")


@pytest.fixture
def recipe(tmp_path: Path, tiny_sd3: Path) -> Recipe:
    Image.radial_gradient("L").convert("RGB").save(tmp_path / "mug.png")
    return Recipe(
        model=str(tiny_sd3), role="subject", images=tmp_path / "mug.png", noun="mug", rank=RANK, alpha=3, steps=3,
        batch_size=2, learning_rate=0.02,
    )  # fmt: skip


def unchanged(pipe: Any, before: dict[str, Tensor]) -> bool:
    model = pipe[0].transformer
    return same(model, before) and not any(p.requires_grad or p.grad is not None for p in model.parameters())


def train_delta(method: str, recipe: Recipe, **base: Any) -> Learned:
    return train_method(method, recipe, **base).learned


def energy(learned: Learned) -> float:
    return sum(inner(delta, delta) for delta in learned.values())


@functools.cache
def inputs() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    sizes = {"hidden_states": (2, 4, 8, 8), "encoder_hidden_states": (2, 6, 64), "pooled_projections": (2, 64)}
    drawn = {name: torch.randn(size, generator=generator) for name, size in sizes.items()}
    return drawn | {"timestep": torch.tensor([300.0, 700.0])}


@torch.no_grad()
def predicted(denoiser: Any) -> Tensor:
    return denoiser(**inputs(), return_dict=False)[0]


@pytest.mark.parametrize("method", ADAPTERS)
def test_delta_weights_are_zero_before_the_first_step(pipe: Any, recipe: Recipe, method: str) -> None:
    before = state(pipe[0].transformer)
    base, begun = predicted(pipe[0].transformer), list[Learned]()

    @contextmanager
    def attach(denoiser: Any, *run: Any) -> Iterator[Attached[Learned]]:
        with ADAPTERS[method].attach(denoiser, *run) as attached:
            begun.append(attached.read())
            assert_rounded(predicted(denoiser), base, terms=NETWORK)
            yield attached

    train_attached(attach, recipe.replace(steps=1), pipe=pipe[0], family=pipe[1])
    assert unchanged(pipe, before)
    # PiSSA takes its start away again, which leaves what rounding leaves
    terms = 64 if method == "pissa" else 0
    for name, delta in begun[0].items():
        start = float(pipe[0].transformer.get_submodule(name).weight.norm())
        assert_rounded(delta.dense(), torch.zeros(delta.shape), terms=terms, size=start)


@pytest.mark.parametrize("method", ADAPTERS)
def test_delta_weights_do_what_the_attached_layers_did(pipe: Any, recipe: Recipe, method: str) -> None:
    """Also: the loss falls, what was learned is not nothing, and the model is left as it was."""
    before, seen = state(pipe[0].transformer), []

    @contextmanager
    def attach(denoiser: Any, *run: Any) -> Iterator[Attached[Learned]]:
        with ADAPTERS[method].attach(denoiser, *run) as attached:
            yield attached
            seen.append(predicted(denoiser))

    learned = train_attached(attach, recipe, pipe=pipe[0], family=pipe[1])
    assert unchanged(pipe, before)
    base = predicted(pipe[0].transformer)
    with applied(pipe[0].transformer, learned):
        now = predicted(pipe[0].transformer)
    assert float((now - base).abs().max()) > 1e-3
    assert_rounded(now, seen[0], terms=NETWORK)
    assert unchanged(pipe, before)


@pytest.mark.parametrize("method", ADAPTERS)
def test_training_lowers_the_loss(pipe: Any, recipe: Recipe, method: str) -> None:
    recipe = recipe.replace(steps=16, batch_size=4, learning_rate=0.05, logit_std=0.1)  # near one noise level
    found = train_method(method, recipe, pipe=pipe[0], family=pipe[1])
    assert len(found.losses) == 16 and sum(found.losses[-4:]) < 0.98 * sum(found.losses[:4])


def test_trained_parameters_are_counted(pipe: Any, recipe: Recipe) -> None:
    sizes = {n: tuple(m.weight.shape) for n, m in pipe[0].transformer.named_modules() if is_target(n, pipe[1].targets)}
    both, inputs_only, whole = (
        sum(count(*size) for size in sizes.values())
        for count in (lambda o, i: RANK * (o + i), lambda o, i: RANK * i, lambda o, i: o * i)
    )
    counted = {m: train_method(m, recipe.replace(steps=1), pipe=pipe[0], family=pipe[1]).trained for m in ADAPTERS}
    assert counted["lora"] == counted["pissa"] == both
    assert {counted[method] for method in FROZEN_UP} == {inputs_only}
    assert counted["full"] == whole
    assert counted["qrlora_published"] == inputs_only - len(sizes)  # one zero under the diagonal of each
    assert counted["qrlora_trained"] == both - len(sizes)
    assert counted["q_cayley"] == inputs_only - len(sizes) + RANK**2 * len(sizes)
    assert counted["qrlora"] == inputs_only - 2 * len(sizes)  # columns 0 and 2 of four
    assert counted["oft"] == sum((2 * RANK - 1) * i // 2 for _, i in sizes.values())


def test_frozen_sides_are_what_they_say(pipe: Any, recipe: Recipe) -> None:
    """ΔW's column space against the singular vectors of W and the shared random columns."""
    methods = ("mica", "q_random", "qrlora_dense")
    learned = {method: train_delta(method, recipe, pipe=pipe[0], family=pipe[1]) for method in methods}
    for name in ("transformer_blocks.0.attn.to_q", "transformer_blocks.1.ff.net.0.proj"):
        weight = pipe[0].transformer.get_submodule(name).weight.detach()
        u, _, _ = torch.linalg.svd(weight, full_matrices=False)
        q = {"mica": u[:, -RANK:], "qrlora_dense": u[:, :RANK]}
        q["q_random"] = orthonormal(len(weight), RANK, f"all {name}")
        for method, columns in q.items():
            assert within(learned[method][name].dense(), columns)
        assert not within(learned["q_random"][name].dense(), q["qrlora_dense"])


def within(matrix: Tensor, columns: Tensor) -> bool:
    """Whether its columns lie in the span of these orthonormal ones."""
    return bool((matrix - columns @ (columns.T @ matrix)).norm() < 1e-3 * matrix.norm())


def test_directions_are_those_of_the_activations(pipe: Any, recipe: Recipe) -> None:
    """Against W C^½ of the bare denoiser, from the same forward passes."""
    names = ["transformer_blocks.0.attn.to_q", "transformer_blocks.1.ff.net.0.proj"]
    layers = {name: pipe[0].transformer.get_submodule(name) for name in names}
    moments, seen = dict.fromkeys(names, 0.0), []

    @contextmanager
    def attach(denoiser: Any, family: Any, recipe: Recipe, losses: Any) -> Iterator[Attached[Learned]]:
        def note(name: str, x: Tensor) -> None:
            rows = x.flatten(0, -2).double()
            moments[name] = moments[name] + rows.T @ rows

        hooks = [m.register_forward_pre_hook(lambda _, args, n=n: note(n, args[0].detach())) for n, m in layers.items()]
        seen.extend(float(loss) for loss in losses(PASSES))
        for hook in hooks:
            hook.remove()
        assert [float(loss) for loss in losses(PASSES)] == seen, "the same at every call"
        with ADAPTERS["lora"].attach(denoiser, family, recipe, losses) as attached:
            yield attached

    train_attached(attach, recipe, pipe=pipe[0], family=pipe[1])
    learned = train_delta("q_activation", recipe, pipe=pipe[0], family=pipe[1])
    for name, layer in layers.items():
        values, vectors = torch.linalg.eigh(moments[name])
        root = vectors * values.clamp(min=0).sqrt() @ vectors.T
        q = torch.linalg.svd(layer.weight.detach().double() @ root)[0][:, :RANK].float()
        found = learned[name]
        assert within(found.dense(), q) and not within(found.dense(), _basis(pipe, name, RANK).q)
        up, _ = found.factors or ()
        assert_rounded(up.T @ up, torch.eye(RANK), terms=64)
        r = up.T @ layer.weight.detach()
        assert_rounded(r.tril(-1), torch.zeros_like(r), terms=64, size=float(layer.weight.norm()))


def test_roles_own_what_no_other_owns(pipe: Any, recipe: Recipe) -> None:
    style = Recipe.of(recipe.model_dump() | {"role": "style", "trigger": None, "caption": None, "columns": None})
    one, other = (train_delta("qrlora", r, pipe=pipe[0], family=pipe[1]) for r in (recipe, style))
    crossed = sum(abs(inner(one[name], other[name])) for name in one)
    assert crossed < 128 * EPS * energy(one)


def test_published_form_is_that_of_the_trainer(pipe: Any, recipe: Recipe) -> None:
    published = recipe.replace(columns="first")
    adapter = train(published, pipe=pipe[0], family=pipe[1])
    learned = train_delta("qrlora_published", published, pipe=pipe[0], family=pipe[1])
    for name, delta in learned.items():
        assert delta.factors is not None
        assert torch.equal(delta.factors[1], adapter.scaling * adapter.deltas[name])


def test_joint_training_sees_both_pictures(pipe: Any, recipe: Recipe, tmp_path: Path) -> None:
    Image.linear_gradient("L").convert("RGB").save(tmp_path / "car.png")
    style = Recipe.of(
        {**recipe.model_dump(), "role": "style", "trigger": None, "caption": None, "images": tmp_path / "car.png"}
    )
    seen: list[set[str]] = []

    @contextmanager
    def attach(denoiser: Any, *run: Any) -> Iterator[Attached[Learned]]:
        with ADAPTERS["lora"].attach(denoiser, *run) as attached:
            hook = denoiser.register_forward_pre_hook(
                lambda _, args, kwargs: seen.append({str(row.sum().item()) for row in kwargs["pooled_projections"]}),
                with_kwargs=True,
            )
            yield attached
            hook.remove()

    train_attached(attach, recipe, pipe=pipe[0], family=pipe[1], beside=[style])
    assert len(seen) == recipe.steps and all(len(captions) == 2 for captions in seen)  # one row of each in every batch
    joint = train_method("lora", recipe, pipe=pipe[0], family=pipe[1], beside=[style]).learned
    alone = train_delta("lora", recipe, pipe=pipe[0], family=pipe[1])
    name = next(iter(joint))
    assert not torch.allclose(joint[name].dense(), alone[name].dense())


def test_turned_columns_stay_orthonormal_and_leave_their_span(pipe: Any, recipe: Recipe) -> None:
    learned = train_delta("q_cayley", recipe, pipe=pipe[0], family=pipe[1])
    for name in ("transformer_blocks.0.attn.to_q", "transformer_blocks.1.ff.net.0.proj"):
        basis = _basis(pipe, name, 2 * RANK)
        up, down = learned[name].factors or ()
        turned = up[:, :RANK] + up[:, RANK:]
        assert_rounded(turned.T @ turned, torch.eye(RANK), terms=64)
        assert torch.equal(up[:, :RANK], basis.q[:, :RANK])
        assert not within(turned, basis.q[:, :RANK]) and within(turned, basis.q)
        assert_rounded(down[RANK:] - down[:RANK], 3 / RANK * basis.r[:RANK], terms=64)


def _basis(pipe: Any, name: str, rank: int) -> Any:
    weight = pipe[0].transformer.get_submodule(name).weight.detach()
    return cached_layer_basis(weight, weight_digest(weight), rank, name=name)


@pytest.mark.parametrize("method", ["pissa", "full"])
def test_a_run_that_fails_leaves_the_model(pipe: Any, recipe: Recipe, method: str) -> None:
    before = state(pipe[0].transformer)

    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train_attached(ADAPTERS[method].attach, recipe, pipe=pipe[0], family=pipe[1], progress=stop)
    assert unchanged(pipe, before)


def test_unknown_methods_and_targets_are_refused(pipe: Any, recipe: Recipe) -> None:
    with pytest.raises(RecipeError, match="no adapter method 'dora'"):
        train_delta("dora", recipe, pipe=pipe[0], family=pipe[1])
    for method in ("full", "lora"):
        with pytest.raises(RecipeError, match="targets match no layer"):
            train_delta(method, recipe.replace(targets=("nothing", "none")), pipe=pipe[0], family=pipe[1])
    with pytest.raises(RecipeError, match=r"(?s)not all layers hold.*to_q \(32 of 40\)"):
        train_delta("q_random", recipe.replace(targets="all-linear", rank=40), pipe=pipe[0], family=pipe[1])


def test_delta_is_read_as_float32_on_the_cpu(pipe: Any, recipe: Recipe) -> None:
    learned = train_delta("qrlora_trained", recipe, pipe=pipe[0], family=pipe[1])
    assert all(isinstance(delta, Delta) and delta.rank == 2 * RANK for delta in learned.values())
    assert {f.dtype for delta in learned.values() for f in delta.factors or ()} == {torch.float32}
