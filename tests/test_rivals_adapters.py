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

from qrlora.errors import DataError, RecipeError
from qrlora.lab.baselines.adapters import ADAPTERS, is_target, orthonormal, taught, teach, teach_joint
from qrlora.lab.baselines.deltas import Delta, Learned, applied, inner
from qrlora.lab.baselines.directions import PASSES
from qrlora.method.basis import cached_layer_basis, weight_digest
from qrlora.models.families import load_pipeline
from qrlora.models.training.loop import Attached, train, train_attached
from qrlora.models.training.recipe import Recipe
from samples import EPS, NETWORK, assert_rounded

RANK = 2
FROZEN_UP = ("mica", "qrlora_dense", "q_minor", "q_random", "q_random_each", "q_activation", "q_gradient")


@pytest.fixture(scope="module")
def pipe(tiny_sd3: Path) -> Any:
    return load_pipeline(tiny_sd3, device="cpu")


@pytest.fixture
def recipe(tmp_path: Path, tiny_sd3: Path) -> Recipe:
    """Its picture has a mask, which all methods but one are to take no notice of."""
    Image.radial_gradient("L").convert("RGB").save(tmp_path / "mug.png")
    mask = Image.new("L", (256, 256))
    mask.paste(255, (0, 0, 128, 256))
    mask.save(tmp_path / "mug.mask.png")
    return Recipe(
        model=str(tiny_sd3), role="subject", images=tmp_path / "mug.png", noun="mug", rank=RANK, alpha=3, steps=3,
        batch_size=2, learning_rate=0.02, mask_min_value=1,
    )  # fmt: skip


def state(pipe: Any) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in pipe[0].transformer.state_dict().items()}


def unchanged(pipe: Any, before: dict[str, Tensor]) -> bool:
    after = pipe[0].transformer.state_dict()
    alone = list(after) == list(before) and all(torch.equal(after[name], before[name]) for name in before)
    return alone and not any(p.requires_grad or p.grad is not None for p in pipe[0].transformer.parameters())


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
    before = state(pipe)
    base, begun = predicted(pipe[0].transformer), list[Learned]()

    @contextmanager
    def attach(denoiser: Any, *run: Any) -> Iterator[Attached[Learned]]:
        with ADAPTERS[method].attach(denoiser, *run) as attached:
            begun.append(attached.read())
            assert_rounded(predicted(denoiser), base, terms=NETWORK)
            yield attached

    train_attached(attach, recipe.replace(steps=1), pipe=pipe[0], family=pipe[1])
    assert unchanged(pipe, before)
    # PiSSA and OLoRA take their start away again, which leaves what rounding leaves
    terms = 64 if method in ("pissa", "olora") else 0
    for name, delta in begun[0].items():
        start = float(pipe[0].transformer.get_submodule(name).weight.norm())
        assert_rounded(delta.dense(), torch.zeros(delta.shape), terms=terms, size=start)


@pytest.mark.parametrize("method", ADAPTERS)
def test_delta_weights_do_what_the_attached_layers_did(pipe: Any, recipe: Recipe, method: str) -> None:
    """Also: the loss falls, what was learned is not nothing, and the model is left as it was."""
    before, seen = state(pipe), []

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
    found = taught(method, recipe, pipe=pipe[0], family=pipe[1])
    assert len(found.losses) == 16 and sum(found.losses[-4:]) < 0.98 * sum(found.losses[:4])


def test_trained_parameters_are_counted(pipe: Any, recipe: Recipe) -> None:
    sizes = {n: tuple(m.weight.shape) for n, m in pipe[0].transformer.named_modules() if is_target(n, pipe[1].targets)}
    both, inputs_only, outputs_only, whole = (
        sum(count(*size) for size in sizes.values())
        for count in (lambda o, i: RANK * (o + i), lambda o, i: RANK * i, lambda o, i: RANK * o, lambda o, i: o * i)
    )
    counted = {m: taught(m, recipe.replace(steps=1), pipe=pipe[0], family=pipe[1]).trained for m in ADAPTERS}
    assert counted["lora"] == counted["pissa"] == counted["olora"] == both
    assert {counted[method] for method in FROZEN_UP} == {inputs_only}
    assert counted["transposed"] == counted["transposed_disjoint"] == counted["orthogonal"] == outputs_only
    assert counted["full"] == whole
    assert counted["qrlora"] == inputs_only - len(sizes)  # one zero under the diagonal of each
    assert counted["qrlora_wide"] == counted["qrlora"]
    assert counted["qrlora_penalty"] == 2 * inputs_only - (2 * RANK) * (2 * RANK - 1) // 2 * len(sizes)
    assert counted["qrlora_trained"] == both - len(sizes)
    assert counted["q_free_4"] == counted["qrlora_trained"]  # there are no more than two columns here
    assert counted["q_cayley"] == inputs_only - len(sizes) + RANK**2 * len(sizes)
    for other in ("qrlora_disjoint_preserve", "qrlora_disjoint_contrast", "qrlora_disjoint_masked"):
        assert counted[other] == counted["qrlora_disjoint"]
    assert counted["qrlora_disjoint"] == inputs_only - 2 * len(sizes)  # columns 0 and 2 of four
    assert counted["oft"] == sum((2 * RANK - 1) * i // 2 for _, i in sizes.values())


def test_frozen_sides_are_what_they_say(pipe: Any, recipe: Recipe) -> None:
    """ΔW's column space, or its row space, against the singular vectors of W and the shared random ones."""
    learned = {
        method: teach(method, recipe, pipe=pipe[0], family=pipe[1])
        for method in ("mica", "q_minor", "q_random", "qrlora_dense", "transposed", "transposed_disjoint", "orthogonal")
    }
    style = teach("transposed_disjoint", recipe.replace(role="style"), pipe=pipe[0], family=pipe[1])
    for name in ("transformer_blocks.0.attn.to_q", "transformer_blocks.1.ff.net.0.proj"):
        weight = pipe[0].transformer.get_submodule(name).weight.detach()
        u, _, vh = torch.linalg.svd(weight, full_matrices=False)
        rows = orthonormal(weight.shape[1], weight.shape[1], f"rows {name}")[:, [0, 2]]
        q = {"mica": u[:, -RANK:], "q_minor": u[:, -RANK:], "qrlora_dense": u[:, :RANK]}
        q["q_random"] = orthonormal(len(weight), RANK, f"all {name}")
        for method, columns in q.items():
            assert within(learned[method][name].dense(), columns)
        assert within(learned["transposed"][name].dense().T, vh[:RANK].T)
        assert within(learned["orthogonal"][name].dense().T, rows)
        subject = learned["transposed_disjoint"][name].dense()
        assert within(subject.T, vh[: 2 * RANK].T) and within(style[name].dense().T, vh[: 2 * RANK].T)
        assert (subject @ style[name].dense().T).norm() < 128 * EPS * subject.norm() * style[name].dense().norm()
        assert not within(learned["q_random"][name].dense(), q["qrlora_dense"])


def within(matrix: Tensor, columns: Tensor) -> bool:
    """Whether its columns lie in the span of these orthonormal ones."""
    return bool((matrix - columns @ (columns.T @ matrix)).norm() < 1e-3 * matrix.norm())


def test_directions_are_those_that_the_lesson_speaks_for(pipe: Any, recipe: Recipe) -> None:
    """Against W C^½ and G of the bare denoiser, made from the same losses."""
    names = ["transformer_blocks.0.attn.to_q", "transformer_blocks.1.ff.net.0.proj"]
    layers = {name: pipe[0].transformer.get_submodule(name) for name in names}
    moments, gradients, seen = dict.fromkeys(names, 0.0), dict.fromkeys(names, 0.0), []

    @contextmanager
    def attach(denoiser: Any, family: Any, recipe: Recipe, losses: Any) -> Iterator[Attached[Learned]]:
        def note(name: str, x: Tensor) -> None:
            rows = x.flatten(0, -2).double()
            moments[name] = moments[name] + rows.T @ rows

        hooks = [m.register_forward_pre_hook(lambda _, args, n=n: note(n, args[0].detach())) for n, m in layers.items()]
        weights = [layer.weight.requires_grad_(True) for layer in layers.values()]
        for loss in losses(PASSES):
            seen.append(loss.item())
            for name, part in zip(names, torch.autograd.grad(loss, weights), strict=True):
                gradients[name] = gradients[name] + part
        for hook in hooks:
            hook.remove()
        denoiser.requires_grad_(False)
        assert [float(loss) for loss in losses(PASSES)] == seen, "the same at every call"
        with ADAPTERS["lora"].attach(denoiser, family, recipe, losses) as attached:
            yield attached

    train_attached(attach, recipe, pipe=pipe[0], family=pipe[1])
    learned = {m: taught(m, recipe, pipe=pipe[0], family=pipe[1]) for m in ("q_activation", "q_gradient")}
    for name, layer in layers.items():
        values, vectors = torch.linalg.eigh(moments[name])
        root = vectors * values.clamp(min=0).sqrt() @ vectors.T
        wanted = {"q_activation": layer.weight.detach().double() @ root, "q_gradient": gradients[name]}
        for method, matrix in wanted.items():
            found = learned[method].learned[name]
            q = torch.linalg.svd(matrix)[0][:, :RANK].float()
            assert within(found.dense(), q) and not within(found.dense(), _basis(pipe, name, RANK).q)
            up, _ = found.factors or ()
            assert_rounded(up.T @ up, torch.eye(RANK), terms=64)
            r = up.T @ layer.weight.detach()
            assert_rounded(r.tril(-1), torch.zeros_like(r), terms=64, size=float(layer.weight.norm()))
    assert learned["q_gradient"].losses[0] == pytest.approx(seen[0], rel=NETWORK * EPS), (
        "those that training begins with"
    )


def test_a_layer_without_influence_keeps_the_columns_of_the_basis(pipe: Any, recipe: Recipe) -> None:
    """The last block's text goes nowhere, so no gradient says what its queries should write."""
    learned = teach("q_gradient", recipe, pipe=pipe[0], family=pipe[1])
    last = len(pipe[0].transformer.transformer_blocks) - 1
    for block, kept in ((0, False), (last, True)):
        name = f"transformer_blocks.{block}.attn.add_q_proj"
        up, _ = learned[name].factors or ()
        assert torch.equal(up, _basis(pipe, name, RANK).q) == kept


def test_roles_own_what_no_other_owns(pipe: Any, recipe: Recipe) -> None:
    style = Recipe.of(recipe.model_dump() | {"role": "style", "trigger": None, "caption": None, "columns": None})
    for method in ("qrlora_disjoint", "orthogonal"):
        one, other = (teach(method, r, pipe=pipe[0], family=pipe[1]) for r in (recipe, style))
        crossed = sum(abs(inner(one[name], other[name])) for name in one)
        assert crossed < 128 * EPS * energy(one)


def test_a_random_basis_of_its_own_goes_by_the_picture(pipe: Any, recipe: Recipe, tmp_path: Path) -> None:
    name = "transformer_blocks.0.attn.to_q"
    Image.linear_gradient("L").convert("RGB").save(tmp_path / "other.png")
    runs = [recipe, recipe.replace(learning_rate=0.01), recipe.replace(images=tmp_path / "other.png")]
    spans = [teach("q_random_each", r, pipe=pipe[0], family=pipe[1])[name].decomposed()[0].float() for r in runs]
    assert within(spans[1], spans[0]) and not within(spans[2], spans[0])
    shared = [teach("q_random", r, pipe=pipe[0], family=pipe[1])[name].decomposed()[0].float() for r in runs]
    assert within(shared[2], shared[0])


def test_published_form_is_that_of_the_trainer(pipe: Any, recipe: Recipe) -> None:
    published = recipe.replace(columns="first")
    adapter = train(published, pipe=pipe[0], family=pipe[1])
    learned = teach("qrlora", published, pipe=pipe[0], family=pipe[1])
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
    joint, alone = (f(pipe, recipe, style) for f in (_joint, _alone))
    name = next(iter(joint))
    assert not torch.allclose(joint[name].dense(), alone[name].dense())


def _joint(pipe: Any, recipe: Recipe, style: Recipe) -> Learned:
    return teach_joint("lora", [recipe, style], pipe=pipe[0], family=pipe[1])


def _alone(pipe: Any, recipe: Recipe, style: Recipe) -> Learned:
    return teach("lora", recipe, pipe=pipe[0], family=pipe[1])


@pytest.mark.parametrize("method", ["pissa", "full"])
def test_a_run_that_fails_leaves_the_model(pipe: Any, recipe: Recipe, method: str) -> None:
    before = state(pipe)

    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        taught(method, recipe, pipe=pipe[0], family=pipe[1], progress=stop)
    assert unchanged(pipe, before)


def test_unknown_methods_and_targets_are_refused(pipe: Any, recipe: Recipe) -> None:
    with pytest.raises(RecipeError, match="no adapter method 'dora'"):
        teach("dora", recipe, pipe=pipe[0], family=pipe[1])
    for method in ("full", "lora"):
        with pytest.raises(RecipeError, match="targets match no layer"):
            teach(method, recipe.replace(targets=("nothing", "none")), pipe=pipe[0], family=pipe[1])
    with pytest.raises(RecipeError, match=r"(?s)not all layers hold.*to_q \(32 of 40\)"):
        teach("q_random", recipe.replace(targets="all-linear", rank=40), pipe=pipe[0], family=pipe[1])
    with pytest.raises(RecipeError, match="no more directions"):
        teach("orthogonal", recipe.replace(columns="15/20"), pipe=pipe[0], family=pipe[1])


def test_delta_is_read_as_float32_on_the_cpu(pipe: Any, recipe: Recipe) -> None:
    learned = teach("qrlora_trained", recipe, pipe=pipe[0], family=pipe[1])
    assert all(isinstance(delta, Delta) and delta.rank == 2 * RANK for delta in learned.values())
    assert {f.dtype for delta in learned.values() for f in delta.factors or ()} == {torch.float32}


def test_only_freed_columns_move(pipe: Any, recipe: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    """Q ΔR + ΔQ (R + ΔR)[:k]: what lies outside span(Q) has rank k, and is read through the first k rows alone."""
    monkeypatch.setattr("qrlora.lab.baselines.adapters.FREED", 1)
    learned = teach("q_free_4", recipe, pipe=pipe[0], family=pipe[1])
    for name in ("transformer_blocks.0.attn.to_q", "transformer_blocks.1.ff.net.0.proj"):
        basis = _basis(pipe, name, RANK)
        outside = _outside(learned[name].dense(), basis.q)
        size = torch.linalg.svdvals(outside)
        rounding = 128 * EPS * float(learned[name].dense().norm())
        assert size[0] > 10 * rounding > 10 * size[1]
        up, down = learned[name].factors or ()
        assert torch.equal(up[:, :RANK], basis.q) and down.shape[0] == RANK + 1
        assert_rounded(down[RANK] - down[0], 3 / RANK * basis.r[0], terms=64)


def test_turned_columns_stay_orthonormal_and_leave_their_span(pipe: Any, recipe: Recipe) -> None:
    learned = teach("q_cayley", recipe, pipe=pipe[0], family=pipe[1])
    for name in ("transformer_blocks.0.attn.to_q", "transformer_blocks.1.ff.net.0.proj"):
        basis = _basis(pipe, name, 2 * RANK)
        up, down = learned[name].factors or ()
        turned = up[:, :RANK] + up[:, RANK:]
        assert_rounded(turned.T @ turned, torch.eye(RANK), terms=64)
        assert torch.equal(up[:, :RANK], basis.q[:, :RANK])
        assert not within(turned, basis.q[:, :RANK]) and within(turned, basis.q)
        assert_rounded(down[RANK:] - down[:RANK], 3 / RANK * basis.r[:RANK], terms=64)


def test_a_penalty_shrinks_what_is_learned_in_the_other_roles_columns(
    pipe: Any, recipe: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    def energies(role: str, price: float) -> tuple[float, float]:
        monkeypatch.setattr("qrlora.lab.baselines.adapters.PENALTY", price)
        learned = teach("qrlora_penalty", recipe.replace(role=role, steps=12), pipe=pipe[0], family=pipe[1])
        rows = [delta.factors[1].square().sum(1) for delta in learned.values() if delta.factors]
        assert {len(row) for row in rows} == {2 * RANK}
        first = 0 if role == "subject" else 1
        return float(sum(r[first::2].sum() for r in rows)), float(sum(r[1 - first :: 2].sum() for r in rows))

    for role in ("subject", "style"):
        own, others = energies(role, 0.0)
        kept, pressed = energies(role, 1e3)
        assert others > 0.1 * own, "nothing is held back without a price"
        assert pressed < 0.1 * others and kept > 0.2 * own


def _basis(pipe: Any, name: str, rank: int) -> Any:
    weight = pipe[0].transformer.get_submodule(name).weight.detach()
    return cached_layer_basis(weight, weight_digest(weight), rank, name=name)


def _outside(matrix: Tensor, q: Tensor) -> Tensor:
    return matrix - q @ (q.T @ matrix)


def test_lessons_against_leakage_ask_for_what_the_base_does(pipe: Any, recipe: Recipe) -> None:
    """Their prompts never call the adapter, and an adapter that is pulled back to the base with might learns less."""
    for method, role in (("qrlora_disjoint_preserve", "style"), ("qrlora_disjoint_contrast", recipe.role)):
        same = recipe.replace(role=role, steps=12)
        loose = teach("qrlora_disjoint", same, pipe=pipe[0], family=pipe[1])
        lesson = ADAPTERS[method].lesson(same)
        assert lesson.preserve and not any(recipe.trigger in prompt for prompt in lesson.preserve)
        held = teach(method, same.replace(preserve_weight=1e4), pipe=pipe[0], family=pipe[1])
        assert energy(held) < 0.8 * energy(loose)


def test_a_subject_is_held_to_nothing(recipe: Recipe) -> None:
    assert ADAPTERS["qrlora_disjoint_preserve"].lesson(recipe) == recipe


@pytest.mark.parametrize(
    ("role", "noun", "caption", "plain"),
    [
        ("subject", "", "a photo of a red <t> in flat style", "a photo of a red thing in flat style"),
        ("subject", "mug", "a photo of a [trigger] mug", "a photo of a mug"),
        ("style", "", "a photo of a red car in <t> style", "a photo of a red car"),
        ("style", "", "a red car in [trigger] style on a cream background", "a red car on a cream background"),
        ("style", "", "[trigger] picture of a car", "picture of a car"),
    ],
)
def test_contrast_says_the_caption_without_its_trigger(role: str, noun: str, caption: str, plain: str) -> None:
    recipe = Recipe(role=role, images="mug.png", trigger="<t>", noun=noun, caption=caption)
    assert ADAPTERS["qrlora_disjoint_contrast"].lesson(recipe).preserve == (plain,)


def test_a_mask_is_for_the_subject_alone(pipe: Any, recipe: Recipe, tmp_path: Path) -> None:
    """As the trainer learns with the mask and without; where all of it is white, it says nothing."""

    def last(method: str, recipe: Recipe) -> float:
        return taught(method, recipe, pipe=pipe[0], family=pipe[1]).losses[-1]

    style = Recipe.of(recipe.model_dump() | {"role": "style", "trigger": None, "caption": None, "columns": None})
    masked, whole = "qrlora_disjoint_masked", "qrlora_disjoint"
    assert last(masked, recipe) == last(whole, recipe.replace(mask_min_value=0)) != last(whole, recipe)
    assert last(masked, style) == last(whole, style)
    Image.new("L", (256, 256), 255).save(tmp_path / "mug.mask.png")
    assert last(masked, recipe) == pytest.approx(last(whole, recipe), rel=NETWORK * EPS)
    (tmp_path / "mug.mask.png").unlink()
    with pytest.raises(DataError, match=r"none for mug\.png"):
        last(masked, recipe)
    assert last(masked, style) == last(whole, style)


def test_the_wide_control_has_the_columns_that_are_turned(pipe: Any, recipe: Recipe) -> None:
    """Bases are not nested: the first r columns of a wider one are others than those of the published form."""
    learned = teach("qrlora_wide", recipe, pipe=pipe[0], family=pipe[1])
    for name in ("transformer_blocks.0.attn.to_q", "transformer_blocks.1.ff.net.0.proj"):
        up, down = learned[name].factors or ()
        assert torch.equal(up, _basis(pipe, name, 2 * RANK).q[:, :RANK])
        assert not torch.allclose(up, _basis(pipe, name, RANK).q) and bool((down.tril(-1) == 0).all())
