"""Live compositions: each picture of a batch as if it were made alone, changed without a trace or a recompilation."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import jaxtyping
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import inject_adapter_in_model
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter

from denoisers import build, predict
from qrlora.errors import MismatchError, TunerError
from qrlora.method.adapter import Adapter, adapter_from_model, attach, remove_adapters
from qrlora.method.composition import Composition, Live
from qrlora.method.composition.batched import batched
from qrlora.method.tuner import QRLoraConfig, QRLoraLayer
from qrlora.models.families import load_pipeline
from qrlora.models.generation import Request, generate, generate_mixed
from samples import NETWORK, assert_rounded, close, make_lora

KINDS = ("flux", "sd3", "unet")
ROWS: list[dict[str, float]] = [{"mug": 1.0}, {"chalk": -0.7, "mug": 0.4}, {}, {"chalk": 1.5}]


def random_adapter(denoiser: Any, targets: list[str] | str, seed: int, std: float = 0.3, **options: Any) -> Adapter:
    """An adapter on the denoiser's basis, trained by chance."""
    torch.manual_seed(seed)
    config = QRLoraConfig(**{"r": 2, "lora_alpha": 3, "target_modules": targets, **options})
    denoiser.add_adapter(config, adapter_name="made")
    for name, parameter in denoiser.named_parameters():
        if "lora_A" in name:
            nn.init.normal_(parameter.data, std=std)
    made = adapter_from_model(denoiser, "made", family="tiny")
    remove_adapters(denoiser, ["made"])
    return made


def pair(denoiser: Any, targets: list[str]) -> dict[str, Adapter]:
    """A subject on all targets and a style on all but the first kind, in the other columns."""
    return {
        "mug": random_adapter(denoiser, targets, 1, columns="subject"),
        "chalk": random_adapter(denoiser, targets[1:], 2, columns="style", triangular=False),
    }


@pytest.fixture(params=KINDS)
def tiny(request: pytest.FixtureRequest) -> tuple[Any, dict[str, Any], dict[str, Adapter]]:
    """A denoiser, inputs for four pictures, and two adapters."""
    denoiser, inputs, targets = build(request.param)
    inputs = {name: value if name.endswith("_ids") else both(value) for name, value in inputs.items()}
    return denoiser, inputs, pair(denoiser, targets)


def both(value: Tensor) -> Tensor:
    """Two pictures' inputs, and two others."""
    return torch.cat([value, value.flip(0) * 0.9])


@contextlib.contextmanager
def alone(denoiser: Any, adapters: Mapping[str, Adapter], row: Mapping[str, float]) -> Iterator[None]:
    """The denoiser with one composition, by the other way: summed beforehand and attached."""
    if row:
        attach(denoiser, Composition([(adapters[name], weight) for name, weight in row.items()]).adapter(), "sum")
    yield
    remove_adapters(denoiser, ["sum"])


@torch.no_grad()
def each_alone(denoiser: Any, inputs: dict[str, Any], adapters: Mapping[str, Adapter]) -> Tensor:
    """What every picture of the batch is with its own composition of ROWS."""
    found = []
    for place, row in enumerate(ROWS):
        with alone(denoiser, adapters, row):
            found.append(predict(denoiser, inputs)[place])
    return torch.stack(found)


def equal(first: Tensor, second: Tensor) -> None:
    assert_rounded(first, second, terms=NETWORK)


# A batch


@torch.no_grad()
def test_every_picture_of_a_batch_meets_its_own_composition(tiny) -> None:
    denoiser, inputs, adapters = tiny
    expected, base = each_alone(denoiser, inputs, adapters), predict(denoiser, inputs)
    with Live(denoiser, adapters) as live:
        assert torch.equal(predict(denoiser, inputs), base)
        live.compose(ROWS)
        mixed = predict(denoiser, inputs)
        equal(mixed, expected)
        equal(mixed[2], base[2])
        assert all((mixed[place] - base[place]).abs().max() > 1e-3 for place in (0, 1, 3))
        live.compose([{}])
        assert torch.equal(predict(denoiser, inputs), base)


@torch.no_grad()
def test_layers_that_hold_fewer_columns_are_composed_alike() -> None:
    denoiser, inputs, _ = build("flux")
    inputs = {name: value if name.endswith("_ids") else both(value) for name, value in inputs.items()}
    options = {"std": 0.05, "r": 20, "lora_alpha": 20}
    adapters = {
        "mug": random_adapter(denoiser, "all-linear", 1, columns="subject", **options),
        "chalk": random_adapter(denoiser, "all-linear", 2, columns="style", **options),
    }
    ranks = {len(delta) for delta in adapters["mug"].deltas.values()}
    assert max(ranks) == 16 and len(ranks) > 1  # of 20
    expected = each_alone(denoiser, inputs, adapters)
    with Live(denoiser, adapters) as live:
        live.compose(ROWS)
        equal(predict(denoiser, inputs), expected)
        live.compose([ROWS[1]], null_space=0.5)
        mixed = predict(denoiser, inputs)
    attach(denoiser, projected(adapters, ROWS[1], 0.5), "sum")
    equal(mixed, predict(denoiser, inputs))


def projected(adapters: Mapping[str, Adapter], row: Mapping[str, float], strength: float) -> Adapter:
    return Composition([(adapters[name], weight) for name, weight in row.items()], strength).adapter()


@torch.no_grad()
def test_in_a_batch_each_picture_has_a_strength_of_its_own(tiny) -> None:
    """A third adapter, of the style's columns, is projected in one row; one at weight 0 and a single one are not."""
    denoiser, inputs, adapters = tiny
    adapters["gold"] = random_adapter(denoiser, [*adapters["chalk"].deltas], 7, columns="style")
    rows = [{"mug": 1.0, "chalk": -0.7}, {"gold": 0.5, "chalk": 1.0, "mug": 0.4}, {"mug": 1.0, "chalk": 0.0}, ROWS[0]]
    strengths = [0.5, 1.0, 1.0, 0.3]
    expected = []
    for place, (row, strength) in enumerate(zip(rows, strengths, strict=True)):
        attach(denoiser, projected(adapters, row, strength), "way")
        expected.append(predict(denoiser, inputs)[place])
        remove_adapters(denoiser, ["way"])
    with Live(denoiser, adapters) as live:
        live.compose(rows)
        summed = predict(denoiser, inputs)
        live.compose(rows, strengths)
        mixed = predict(denoiser, inputs)
        equal(mixed, torch.stack(expected))
        changed = [(mixed[place] - summed[place]).abs().max() > 1e-3 for place in range(4)]
        assert changed == [True, True, False, False]
        live.compose(rows, 0.0)
        assert torch.equal(predict(denoiser, inputs), summed)


@torch.no_grad()
def test_no_strength_is_the_default_of_the_roles_that_meet(tiny) -> None:
    denoiser, inputs, adapters = tiny
    for name, role in (("mug", "subject"), ("chalk", "style")):
        adapters[name] = replace(adapters[name], metadata=replace(adapters[name].metadata, role=role))
    rows = [{"mug": 1.0, "chalk": -0.7}, {"mug": 1.0}] * 2
    with Live(denoiser, adapters) as live:
        found = []
        for strength in (None, [None, 0.0, 0.5, None], 0.5, 0.0):
            live.compose(rows, strength)
            found.append(predict(denoiser, inputs))
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])
    assert not torch.equal(found[0], found[3])


@torch.no_grad()
def test_projection_follows_the_adapters_that_come_and_go(tiny) -> None:
    """More sets than are cached; then one adapter is replaced, and what is attached is widened."""
    denoiser, inputs, adapters = tiny
    others = {
        str(seed): random_adapter(denoiser, [*adapters["mug"].deltas][:4], seed, columns="subject")
        for seed in range(10)
    }

    def expected(found: Mapping[str, Adapter], row: Mapping[str, float]) -> Tensor:
        attach(denoiser, projected(found, row, 1.0), "way")
        made = predict(denoiser, inputs)
        remove_adapters(denoiser, ["way"])
        return made

    rows = [{name: 1.0, "0": 0.5} for name in others if name != "0"]
    wanted = [expected(others, row) for row in (*rows, rows[0])]
    replaced, both = {**others, "0": others["9"]}, {"mug": 1.0, "chalk": 1.0}
    wanted += [expected(replaced, rows[0]), expected(adapters, both)]
    with Live(denoiser, others) as live:
        for row, picture in zip((*rows, rows[0]), wanted, strict=False):
            live.compose([row], 1.0)
            equal(predict(denoiser, inputs), picture)
        live.compose([{}])
        live.remove("0")
        live.add("0", others["9"])
        live.compose([rows[0]], 1.0)
        equal(predict(denoiser, inputs), wanted[-2])
        for name, adapter in adapters.items():
            live.add(name, adapter)
        equal(predict(denoiser, inputs), wanted[-2])
        live.compose([both], 1.0)
        equal(predict(denoiser, inputs), wanted[-1])
        live.remove("chalk")
        live_alone = predict(denoiser, inputs)
        live.compose([{"mug": 1.0}])
        assert torch.equal(predict(denoiser, inputs), live_alone)


@torch.no_grad()
def test_one_composition_is_for_the_whole_batch(tiny) -> None:
    denoiser, inputs, adapters = tiny
    with alone(denoiser, adapters, ROWS[1]):
        expected = predict(denoiser, inputs)
    with Live(denoiser, adapters) as live:
        live.compose(ROWS)
        live.compose([ROWS[1]])
        equal(predict(denoiser, inputs), expected)


@torch.no_grad()
def test_guidance_repeats_the_compositions(tiny) -> None:
    """Two compositions over four rows: unconditional 0 and 1, then conditional 0 and 1."""
    denoiser, inputs, adapters = tiny
    with Live(denoiser, adapters) as live:
        live.compose([ROWS[0], ROWS[3]] * 2)
        expected = predict(denoiser, inputs)
        live.compose([ROWS[0], ROWS[3]])
        equal(predict(denoiser, inputs), expected)


@torch.no_grad()
def test_half_precision() -> None:
    """As near to the picture alone in bfloat16 as that is to float32."""
    denoiser, inputs, targets = build("flux")
    inputs = {n: v if n.endswith("_ids") else both(v) for n, v in inputs.items()}
    adapters = pair(denoiser, targets)
    exact = each_alone(denoiser, inputs, adapters)
    halved = denoiser.to(torch.bfloat16)
    inputs = {name: value.bfloat16() for name, value in inputs.items()}
    adapters = pair(halved, targets)
    expected = each_alone(halved, inputs, adapters)
    with Live(halved, adapters) as live:
        live.compose(ROWS)
        mixed = predict(halved, inputs)
    assert mixed.dtype == torch.bfloat16
    scale = (expected.float() - exact).norm()
    assert (mixed - expected).norm() < scale


WEIGHTS = st.floats(-4, 4, width=32)


def tables(adapters: int) -> st.SearchStrategy[list[list[float]]]:
    return st.lists(st.lists(WEIGHTS, min_size=adapters, max_size=adapters), min_size=1, max_size=4)


LAYERS = {
    "linear": (lambda: nn.Linear(10, 12), (5, 10)),
    "vector": (lambda: nn.Linear(10, 12), (10,)),
    "picture": (lambda: nn.Linear(10, 12), (2, 3, 10)),
    "conv1d": (lambda: nn.Conv1d(4, 8, 3), (4, 7)),
    "conv2d": (lambda: nn.Conv2d(3, 9, 3, padding=1, stride=2), (3, 6, 6)),
    "conv3d": (lambda: nn.Conv3d(2, 7, 2, padding_mode="circular", padding=1), (2, 3, 3, 3)),
}


@pytest.mark.parametrize("kind", LAYERS)
@given(
    table=st.integers(1, 4).flatmap(tables),
    turns=st.integers(1, 3),
)
@settings(max_examples=15, deadline=None)
def test_a_layer_is_linear_in_the_weights(kind: str, table: list[list[float]], turns: int) -> None:
    """Row i of the output, less the base's, is the weighted sum of what every ΔR alone adds to row i."""
    torch.manual_seed(3)
    make, shape = LAYERS[kind]
    config = QRLoraConfig(r=3, target_modules="0", columns="style", triangular=False, init_lora_weights=False)
    layer: Any = adapted(make(), config)
    delta = layer.lora_A["default"] = batched(layer.lora_A["default"])
    weights = torch.tensor(table)
    n, k = weights.shape
    several = torch.randn(k, 3, delta.weight[0].numel())
    x = torch.randn(n * turns, *shape)
    base, alone = layer.base_layer(x), []
    for one in several:
        delta.hold(one[None])
        alone.append(layer(x) - base)
    delta.hold(torch.einsum("nk,kri->nri", weights, several))
    expected = torch.einsum("nk,kn...->n...", weights.repeat(turns, 1), torch.stack(alone))
    summands = torch.einsum("nk,kn...->n...", weights.abs().repeat(turns, 1), torch.stack(alone).abs())
    size = float((base.abs().max() + summands.max()).detach())  # the base's output comes in and is taken off again
    assert_rounded(layer(x) - base, expected, terms=64, size=size)


def adapted(layer: nn.Module, config: QRLoraConfig) -> QRLoraLayer:
    return inject_adapter_in_model(config, nn.Sequential(layer))[0]


# Pictures


def test_pictures_of_mixed_batches_are_those_made_alone(tiny_model: Path) -> None:
    """Every family, with its guidance: four requests in batches of three and one, and in one batch of four."""
    pipe, family = load_pipeline(tiny_model, device="cpu")
    denoiser, targets = family.denoiser_of(pipe), list(family.targets)
    adapters = {
        "mug": random_adapter(denoiser, targets, 1, columns="subject"),
        "chalk": random_adapter(denoiser, targets, 2, columns="style"),
    }
    requests = [Request(f"a {thing}", seed, row) for seed, (thing, row) in enumerate(zip("abcd", ROWS, strict=True))]
    resolution = min(family.resolution(pipe), 64)
    options: dict[str, Any] = {"steps": 2, "guidance": 3.0, "resolution": resolution}
    expected = []
    for request in requests:
        parts = [(adapters[name], weight) for name, weight in request.composition.items()]
        expected += generate(pipe, family, [request.prompt], [request.seed], adapters=parts, **options)
    with Live(denoiser, adapters) as live:
        for batch_size in (3, 4):
            pictures = generate_mixed(pipe, family, requests, live, batch_size=batch_size, **options)
            assert all(close(one, other) for one, other in zip(pictures, expected, strict=True))
    base = [generate(pipe, family, [r.prompt], [r.seed], **options)[0] for r in requests]
    assert [close(one, other) for one, other in zip(pictures, base, strict=True)] == [False, False, True, False]


# Change


@pytest.mark.parametrize(
    ("kind", "part"), [("flux", "single_transformer_blocks.0"), ("unet", "down_blocks.1.resnets.0")]
)
@torch.no_grad()
def test_other_weights_recompile_nothing(kind: str, part: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A block of Linear layers, and one of convolutions."""
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # shape checks are no part of a graph
    denoiser, inputs, targets = build(kind)
    adapters, counter = pair(denoiser, targets), CompileCounter()
    torch._dynamo.reset()
    with Live(denoiser, adapters) as live:
        live.compose(ROWS[:2])
        block = denoiser.get_submodule(part)
        block.compile(backend=counter, fullgraph=True)
        first = predict(denoiser, inputs)
        assert counter.frame_count == 1
        for rows in ([ROWS[1], ROWS[3]], [{}] * 2, [{"mug": -2.0}] * 2):
            live.compose(rows)
            compiled = predict(denoiser, inputs)
            with monkeypatch.context() as patch:
                patch.setattr(block, "_compiled_call_impl", None)
                equal(compiled, predict(denoiser, inputs))
            assert (compiled - first).abs().max() > 1e-3
        assert counter.frame_count == 1
    torch._dynamo.reset()


def held(denoiser: nn.Module) -> dict[str, tuple[int, torch.Size]]:
    """Address and shape of what the denoiser computes with."""
    deltas = {n: p for n, p in denoiser.named_parameters() if "lora_A" in n}
    return {name: (parameter.data_ptr(), parameter.shape) for name, parameter in deltas.items()}


@torch.no_grad()
def test_what_is_computed_with_does_not_grow_with_the_adapters(tiny) -> None:
    denoiser, inputs, adapters = tiny
    with Live(denoiser, adapters) as live:
        live.compose(ROWS)
        before, mixed = held(denoiser), predict(denoiser, inputs)
        for number in range(5):
            live.add(f"other {number}", adapters["mug"])
            assert torch.equal(predict(denoiser, inputs), mixed)
        live.compose([{name: 0.3 for name in live.names}] * 4)
        assert held(denoiser) == before and len(live.names) == 7
        for number in range(5):
            live.remove(f"other {number}")
        live.compose(ROWS)
        assert held(denoiser) == before and torch.equal(predict(denoiser, inputs), mixed)
        live.remove("chalk")
        without = predict(denoiser, inputs)
        live.compose([{"mug": 1.0}, {"mug": 0.4}, {}, {}])
        assert torch.equal(predict(denoiser, inputs), without)


@torch.no_grad()
def test_an_adapter_of_other_columns_and_layers_joins(tiny) -> None:
    denoiser, inputs, adapters = tiny
    expected, state = each_alone(denoiser, inputs, adapters), denoiser.state_dict()
    with Live(denoiser, {}) as live:
        live.compose([{}] * 4)
        live.add("chalk", adapters["chalk"])
        live.compose([{}, {}, {}, {"chalk": 1.5}])
        chalk = predict(denoiser, inputs)
        live.add("mug", adapters["mug"])
        equal(predict(denoiser, inputs), chalk)
        live.compose(ROWS)
        equal(predict(denoiser, inputs), expected)
        assert len(denoiser.peft_config) == 1
    assert list(denoiser.state_dict()) == list(state)


@torch.no_grad()
def test_the_denoiser_comes_back_as_it_was(tiny) -> None:
    denoiser, inputs, adapters = tiny
    before, modules, base = denoiser.state_dict(), [type(m) for m in denoiser.modules()], predict(denoiser, inputs)
    with pytest.raises(RuntimeError, match="on purpose"), Live(denoiser, adapters) as live:
        live.compose(ROWS)
        predict(denoiser, inputs)
        raise RuntimeError("on purpose")
    after = denoiser.state_dict()
    assert list(after) == list(before) and all(torch.equal(after[name], before[name]) for name in before)
    assert [type(m) for m in denoiser.modules()] == modules
    assert torch.equal(predict(denoiser, inputs), base)
    assert not getattr(denoiser, "peft_config", None)


# Refusals


@pytest.fixture
def sd3() -> tuple[Any, dict[str, Any], dict[str, Adapter]]:
    denoiser, inputs, targets = build("sd3")
    return denoiser, inputs, pair(denoiser, targets)


def test_adapters_that_are_not_of_one_basis_of_this_model(sd3) -> None:
    denoiser, _, adapters = sd3
    keys = list(denoiser.state_dict())
    other = random_adapter(denoiser, ["to_q"], 3, basis_seed=5, columns="subject")
    for stranger in (make_lora(), other):
        with pytest.raises(MismatchError, match="qrlora import FILE --like"):
            Live(denoiser, {**adapters, "stranger": stranger})
        with Live(denoiser, adapters) as live:
            with pytest.raises(MismatchError, match="qrlora import FILE --like"):
                live.add("stranger", stranger)
            assert live.names == tuple(adapters)
    with torch.no_grad():
        denoiser.transformer_blocks[0].attn.to_q.weight.add_(0.1)
    with pytest.raises(MismatchError, match="another basis"):
        Live(denoiser, adapters)
    assert list(denoiser.state_dict()) == keys and not getattr(denoiser, "peft_config", None)


@torch.no_grad()
def test_a_refused_adapter_leaves_the_rest_at_work(sd3) -> None:
    """One that would have widened what is attached, but was made on another weight."""
    denoiser, inputs, _ = sd3
    twin, _, _ = build("sd3")
    twin.transformer_blocks[1].attn.to_k.weight.add_(0.1)
    stranger = random_adapter(twin, "transformer_blocks.1.attn.to_k", 3, columns="style")
    only = random_adapter(denoiser, "transformer_blocks.0.attn.to_q", 4, columns="subject")
    with Live(denoiser, {"only": only}) as live:
        live.compose([{"only": 2.0}])
        before = predict(denoiser, inputs)
        with pytest.raises(MismatchError, match="another basis"):
            live.add("stranger", stranger)
        assert torch.equal(predict(denoiser, inputs), before) and live.names == ("only",)
        live.compose([{"only": 1.0}])
        assert not torch.equal(predict(denoiser, inputs), before)


@pytest.mark.parametrize(
    ("rows", "share", "message"),
    [
        ([], 0.0, "no composition"),
        ([{"mug": 1.0}, {"cup": 1.0}], 0.0, "not there"),
        ([{"mug": float("nan")}], 0.0, "finite weights"),
        ([{"mug": 1.0}], 1.5, "0 to 1"),
        ([{"mug": 1.0}], float("nan"), "0 to 1"),
        ([{"mug": 1.0}], [0.5, 0.5], "do not fit"),
    ],
)
def test_compositions_that_cannot_be(sd3, rows, share, message) -> None:
    denoiser, _, adapters = sd3
    with Live(denoiser, adapters) as live:
        live.compose([{"mug": 1.0}])
        before = held(denoiser)
        with pytest.raises(MismatchError, match=message):
            live.compose(rows, share)
        assert held(denoiser) == before


def test_names_and_denoisers_that_are_taken(sd3, tiny_sd3: Path) -> None:
    denoiser, _, adapters = sd3
    with Live(denoiser, adapters) as live:
        with pytest.raises(MismatchError, match="name in use"):
            live.add("mug", adapters["mug"])
        with pytest.raises(MismatchError, match="no such adapter"):
            live.remove("cup")
        with pytest.raises(TunerError, match="a denoiser with adapters"):
            Live(denoiser, adapters)
        pipe, family = load_pipeline(tiny_sd3, device="cpu")
        with pytest.raises(MismatchError, match="another denoiser"):
            generate_mixed(pipe, family, [Request("a", 0, {})], live)


@torch.no_grad()
def test_batches_that_compositions_do_not_fit(sd3) -> None:
    denoiser, inputs, adapters = sd3
    with Live(denoiser, adapters) as live:
        live.compose(ROWS)
        with pytest.raises(TunerError, match="do not fit"):
            predict(denoiser, inputs)
        layer = next(module for module in denoiser.modules() if isinstance(module, QRLoraLayer))
        with pytest.raises(TunerError, match="tokens of all pictures"):
            layer(torch.zeros(4 * 32, layer.in_features))
        with pytest.raises(TunerError, match="several compositions"):
            layer.merge()
        live.compose([{"mug": 1.0}])
        expected = predict(denoiser, inputs)
        for module in denoiser.modules():
            if isinstance(module, QRLoraLayer):
                module.merge()
        equal(predict(denoiser, inputs), expected)
