"""The tuner on the real denoiser classes, and everything about a layer that PEFT's contract does not say."""

from __future__ import annotations

import copy
import re

import jaxtyping
import pytest
import torch
from peft import LoraConfig, get_peft_model, inject_adapter_in_model
from torch import Tensor, nn

from denoisers import BUILDERS, build, predict
from qrlora.errors import TunerError
from qrlora.method import tuner as tuner_package
from qrlora.method.basis import Basis, layer_basis
from qrlora.method.tuner import QRLoraConfig, QRLoraLayer, adapter_fingerprint, basis_digests, resolve_columns
from samples import NETWORK, assert_rounded

# diffusers' second add_adapter goes through a PEFT constructor that warns whenever the model has one already.
pytestmark = pytest.mark.filterwarnings("ignore:Already found a `peft_config` attribute:UserWarning")


def layers_of(model: nn.Module) -> dict[str, QRLoraLayer]:
    return {name: module for name, module in model.named_modules() if isinstance(module, QRLoraLayer)}


def base_weights(model: nn.Module) -> dict[str, Tensor]:
    """Every value that is the base model's own, by its name without adapters."""
    state = {name.replace(".base_layer", ""): value.clone() for name, value in model.state_dict().items()}
    return {name: value for name, value in state.items() if "lora_" not in name}


def randomise(model: nn.Module, adapter_name: str, scale: float = 0.3) -> None:
    with torch.no_grad():
        for layer in layers_of(model).values():
            if adapter_name in layer.lora_A:
                layer.lora_A[adapter_name].weight.normal_(std=scale)


def same(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


@pytest.fixture(params=BUILDERS)
def denoiser(request):
    return build(request.param)


@pytest.fixture
def sd3():
    return build("sd3")


class Layered(nn.Module):
    """One Linear and one convolution, to look at single layers."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(24, 20)
        self.conv = nn.Conv2d(3, 12, 3, stride=2, padding=2, dilation=2)

    def forward(self, x: Tensor, picture: Tensor) -> tuple[Tensor, Tensor]:
        return self.linear(x), self.conv(picture)


@pytest.fixture
def layered():
    torch.manual_seed(0)
    return Layered().requires_grad_(False), (torch.randn(5, 24), torch.randn(5, 3, 9, 9))


TARGETS = ["linear", "conv"]


# In the denoisers -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"triangular": False}, {"columns": "style"}, {"train_basis": True}])
def test_a_fresh_adapter_leaves_the_denoiser_bit_for_bit(denoiser, options):
    model, inputs, targets = denoiser
    before = predict(model, inputs)
    model.add_adapter(QRLoraConfig(r=2, target_modules=targets, **options))
    assert len(layers_of(model)) >= len(targets)
    assert torch.equal(predict(model, inputs), before)


@pytest.mark.parametrize("optimizer", [torch.optim.AdamW, torch.optim.SGD])
def test_training_changes_delta_r_alone_and_keeps_its_triangle(denoiser, optimizer):
    model, inputs, targets = denoiser
    base, before = base_weights(model), predict(model, inputs)
    model.add_adapter(QRLoraConfig(r=3, columns="1/2", target_modules=targets))
    bases = {name: layer.lora_B["default"].q.clone() for name, layer in layers_of(model).items()}
    trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert all(".lora_A.default.weight" in name for name in trainable)
    options = {"momentum": 0.9} if optimizer is torch.optim.SGD else {}
    steps = optimizer(trainable.values(), lr=0.05, weight_decay=0.1, **options)
    for _ in range(3):
        steps.zero_grad()
        predict(model, inputs).square().mean().backward()
        steps.step()
    assert same(base_weights(model), base)
    assert not torch.equal(predict(model, inputs), before)
    moved = 0
    for name, layer in layers_of(model).items():
        assert torch.equal(layer.lora_B["default"].q, bases[name])
        rows = layer.lora_A["default"].weight.flatten(1)
        outside = torch.arange(rows.shape[1]) < torch.tensor([1, 3, 5]).unsqueeze(1)
        assert not bool(rows[outside].any())
        moved += bool(rows[~outside].all())
    assert moved >= len(trainable) // 2  # layers that this loss does not reach keep their zeros


def test_merging_matches_and_unmerging_gives_the_base_back(denoiser):
    model, inputs, targets = denoiser
    base = base_weights(model)
    for name in ("subject", "style"):
        model.add_adapter(QRLoraConfig(r=2, columns=name, target_modules=targets), name)
        randomise(model, name, 0.1)
    model.set_adapters(["subject", "style"], [0.9, -0.5])
    apart = predict(model, inputs)
    model.fuse_lora()
    assert_rounded(predict(model, inputs), apart, terms=NETWORK)
    assert not same(base_weights(model), base)
    model.unfuse_lora()
    assert same(base_weights(model), base)
    assert torch.equal(predict(model, inputs), apart)
    model.disable_adapters()
    assert same(base_weights(model), base)


def test_trained_parameters_are_half_of_lora_on_square_layers(sd3):
    model, _, _ = sd3
    plain = copy.deepcopy(model)
    attention = ["to_q", "to_k", "to_v", "to_out.0"]
    model.add_adapter(QRLoraConfig(r=4, target_modules=attention))
    plain.add_adapter(LoraConfig(r=4, target_modules=attention))
    ours, theirs = (sum(p.numel() for p in m.parameters() if p.requires_grad) for m in (model, plain))
    assert ours * 2 == theirs


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_bfloat16_denoiser_keeps_q_as_wide_as_delta_r(sd3, dtype):
    model, inputs, targets = sd3
    model = model.to(torch.bfloat16)
    inputs = {name: value.to(torch.bfloat16) for name, value in inputs.items()}
    before, base = predict(model, inputs), base_weights(model)
    config = QRLoraConfig(r=3, target_modules=targets)
    tuned = get_peft_model(model, config, autocast_adapter_dtype=dtype == torch.float32)
    for layer in layers_of(model).values():
        q = layer.lora_B["default"].q
        assert layer.lora_A["default"].weight.dtype == q.dtype == dtype
        exact = layer_basis(layer.get_base_layer().weight, 3).q  # not a bfloat16 Q cast back
        torch.testing.assert_close(q, exact.to(dtype), atol=0, rtol=0)
    assert torch.equal(predict(tuned, inputs), before)
    randomise(model, "default")
    tuned.merge_adapter()
    tuned.unmerge_adapter()
    assert same(base_weights(model), base)


def test_diffusers_scales_and_deletes(sd3):
    model, inputs, targets = sd3
    base = predict(model, inputs)
    for name in ("subject", "style"):
        model.add_adapter(QRLoraConfig(r=2, columns=name, target_modules=targets), name)
        randomise(model, name, 0.1)
    model.set_adapter("subject")
    full = predict(model, inputs)
    scaled = predict(model, {**inputs, "joint_attention_kwargs": {"scale": 0.0}})
    assert torch.equal(scaled, base)
    assert torch.equal(predict(model, inputs), full)
    model.set_adapters("subject", 0.0)
    assert torch.equal(predict(model, inputs), base)
    model.set_adapter("style")
    model.delete_adapters("subject")
    assert all(set(layer.lora_B) == {"style"} for layer in layers_of(model).values())


def test_adapters_know_the_basis_they_were_made_on(sd3):
    model, _, targets = sd3
    weights = {
        name: module.weight
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and any(name == t or name.endswith(f".{t}") for t in targets)
    }
    basis = Basis.of(weights, 4)
    model.add_adapter(QRLoraConfig(r=2, columns="style", target_modules=targets), "style")
    assert basis_digests(model, "style") == basis.digests
    assert adapter_fingerprint(model, "style") == basis.fingerprint
    for name, layer in layers_of(model).items():
        torch.testing.assert_close(layer.lora_B["style"].q, basis[name].q[:, 1::2], atol=0, rtol=0)
    wrapped = get_peft_model(build("sd3")[0], QRLoraConfig(r=4, target_modules=targets))
    assert adapter_fingerprint(wrapped, "default") == basis.fingerprint
    with pytest.raises(TunerError, match=r"(?s)subject.*style"):
        adapter_fingerprint(model, "subject")


# Columns and configuration --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("columns", "r", "basis_rank", "resolved"),
    [
        ("first", 3, None, (0, 1, 2)),
        ("first", 3, 8, (0, 1, 2)),
        ("subject", 3, None, (0, 2, 4)),
        ("style", 3, None, (1, 3, 5)),
        ("2/3", 2, None, (2, 5)),
        ([0, 3, 4], 3, None, (0, 3, 4)),
        ((1, 2), 2, 9, (1, 2)),
    ],
)
def test_columns_resolve(columns, r, basis_rank, resolved):
    assert resolve_columns(columns, r, basis_rank) == resolved
    config = QRLoraConfig(r=r, columns=columns, basis_rank=basis_rank)
    assert config.rank_of_basis == (
        basis_rank or {"style": 6, "subject": 6, "2/3": 6}.get(str(columns), resolved[-1] + 1)
    )


@pytest.mark.parametrize(
    ("columns", "r", "basis_rank"),
    [("first", 4, 3), ("style", 2, 3), ("2/2", 2, None), ("look", 2, None), ("1-2", 2, None), ([2, 1], 2, None)]
    + [([0, 0], 2, None), ([-1, 0], 2, None), ([0, 1, 2], 2, None), ([], 0, None), ("first", 0, None)],
)
def test_columns_that_do_not_fit_are_refused(columns, r, basis_rank):
    with pytest.raises(TunerError, match="columns"):
        QRLoraConfig(r=r, columns=columns, basis_rank=basis_rank)


@pytest.mark.parametrize(
    "options",
    [
        {"use_dora": True},
        {"lora_bias": True},
        {"target_parameters": ["weight"]},
        {"layer_replication": [(0, 1)]},
        {"init_lora_weights": "gaussian"},
        {"init_lora_weights": "pissa"},
        {"algorithm": "quick"},
    ],
)
def test_options_that_cannot_work_on_a_frozen_basis_are_refused(options):
    ((name, value),) = options.items()
    with pytest.raises(TunerError) as refusal:
        QRLoraConfig(target_modules=["linear"], **options)
    assert str(value) in str(refusal.value.got)
    assert name == "algorithm" or name in str(refusal.value)


def test_dora_is_refused_with_both_values():
    with pytest.raises(TunerError, match=r"(?s)expected: .*'use_dora': False.*got: .*'use_dora': True"):
        QRLoraConfig(target_modules=["linear"], use_dora=True)


def test_a_rank_pattern_uses_one_basis_for_all_layers(layered):
    model, _ = layered
    config = QRLoraConfig(r=2, rank_pattern={"linear": 4}, target_modules=TARGETS)
    assert config.rank_of_basis == 4
    tuned = get_peft_model(model, config)
    assert [len(layer.lora_B["default"].columns) for layer in layers_of(tuned).values()] == [4, 2]
    assert {layer.lora_B["default"].basis.key for layer in layers_of(tuned).values()} == {(4, "fast", 0)}


@pytest.mark.parametrize(
    ("module", "message"),
    [
        (nn.Embedding(8, 4), "Embedding"),
        (nn.Conv2d(4, 4, 3, groups=2), "groups=2"),
        (nn.LayerNorm(4), "LayerNorm"),
    ],
)
def test_layers_without_a_basis_are_refused_by_name(module, message):
    with pytest.raises(TunerError, match=f"(?s)'odd'.*{message}"):
        get_peft_model(nn.ModuleDict({"odd": module}), QRLoraConfig(r=2, target_modules=["odd"]))


@pytest.mark.parametrize("targets", [["to_x"], "to_q,to_k", "(("])
def test_targets_that_match_nothing_are_named(sd3, targets):
    model, _, _ = sd3
    with pytest.raises(TunerError, match=r"(?s)match no layer.*" + re.escape(str(targets).strip("[']"))):
        model.add_adapter(QRLoraConfig(r=2, target_modules=targets))


def test_a_rank_above_the_weight_is_clipped_to_it_and_said_once(caplog):
    layers = nn.ModuleDict({"narrow": nn.Linear(3, 9), "wide": nn.Linear(8, 8), "single": nn.Linear(5, 1)})
    weights = {name: layer.weight.detach().clone() for name, layer in layers.items()}
    model = get_peft_model(layers, QRLoraConfig(r=4, lora_alpha=8, target_modules=list(weights)))
    assert [record.getMessage() for record in caplog.records] == [
        "rank clipped to what a layer's smaller side holds, in 2 layers: narrow (3 of 4), single (1 of 4)"
    ]
    basis = Basis.of(weights, 4)
    for name in weights:
        layer = layers[name]
        nn.init.normal_(layer.lora_A["default"].weight)
        assert torch.equal(layer.lora_B["default"].q, basis[name].q)
        assert layer.delta_r("default").shape == (min(4, *weights[name].shape), weights[name].shape[1])
        assert layer.scaling["default"] == 2.0  # of the rank that was asked for, in every layer
        torch.testing.assert_close(layer.get_delta_weight("default"), 2 * basis[name].q @ layer.delta_r("default"))
        assert layer.delta_r("default").count_nonzero() == layer.delta_r("default").triu().count_nonzero() > 0
    assert adapter_fingerprint(model, "default") == basis.fingerprint


def test_a_layer_without_a_column_of_the_adapter_s_stays_as_it_is(caplog):
    layers = nn.ModuleDict({"single": nn.Linear(5, 1), "two": nn.Linear(2, 6), "wide": nn.Linear(8, 8)})
    options = {"r": 3, "target_modules": list(layers), "init_lora_weights": False}
    model = get_peft_model(layers, QRLoraConfig(columns="subject", **options))
    model.add_adapter("style", QRLoraConfig(columns="style", **options))
    assert caplog.messages[1].endswith("in 2 layers: single (0 of 3), two (1 of 3)")
    owned = {n: {a: up.columns for a, up in layer.lora_B.items()} for n, layer in layers.items()}
    assert owned == {
        "single": {"default": (0,)},
        "two": {"default": (0,), "style": (1,)},
        "wide": {"default": (0, 2, 4), "style": (1, 3, 5)},
    }
    model.base_model.add_weighted_adapter(["default", "style"], [0.5, -2.0], "sum")
    for layer in layers.values():
        parts = zip(("default", "style"), (0.5, -2.0), strict=True)
        expected = sum(weight * layer.get_delta_weight(name) for name, weight in parts if name in layer.lora_A)
        torch.testing.assert_close(layer.get_delta_weight("sum"), expected)
    with pytest.raises(TunerError, match=r"(?s)no target has a column.*single \(0 of 3\)"):
        options["target_modules"] = ["single"]
        get_peft_model(nn.ModuleDict({"single": nn.Linear(5, 1)}), QRLoraConfig(columns="style", **options))


# One layer ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("columns", ["first", "style", [0, 1, 4]])
@pytest.mark.parametrize("triangular", [True, False])
def test_delta_weight_is_q_times_delta_r(layered, columns, triangular):
    model, inputs = layered
    before = model(*inputs)
    config = QRLoraConfig(r=3, lora_alpha=6, columns=columns, triangular=triangular, target_modules=TARGETS)
    model = get_peft_model(model, config)
    randomise(model, "default")
    for layer in layers_of(model).values():
        weight = layer.get_base_layer().weight
        q = layer_basis(weight, config.rank_of_basis).q[:, list(resolve_columns(columns, 3))]
        delta_r = layer.lora_A["default"].weight.flatten(1)
        if triangular:
            delta_r = delta_r * (torch.arange(delta_r.shape[1]) >= torch.tensor(resolve_columns(columns, 3))[:, None])
        assert_rounded(layer.get_delta_weight("default").flatten(1), 2 * q @ delta_r, terms=16)
        assert torch.equal(layer.delta_r("default"), delta_r)
    apart = model(*inputs)
    model.merge_adapter()
    for merged, unmerged, base in zip(model(*inputs), apart, before, strict=True):
        assert_rounded(merged, unmerged, terms=256)
        assert not torch.allclose(merged, base, atol=1e-2)


def test_adapters_of_one_layer_share_one_q_through_moves_and_copies(layered):
    model, _ = layered
    model = get_peft_model(model, QRLoraConfig(r=3, columns="subject", target_modules=TARGETS), "subject")
    model.add_adapter("style", QRLoraConfig(r=3, columns="style", target_modules=TARGETS))
    model.add_adapter("all", QRLoraConfig(r=6, target_modules=TARGETS))
    model.add_adapter("other", QRLoraConfig(r=6, basis_seed=1, target_modules=TARGETS))
    for moved in (model, copy.deepcopy(model), copy.deepcopy(model).to(torch.float64)):
        for layer in layers_of(moved).values():
            owners = {name: columns.basis.q.data_ptr() for name, columns in layer.lora_B.items()}
            assert owners["subject"] == owners["style"] == owners["all"] != owners["other"]
            assert layer.lora_B["style"].q.data_ptr() == layer.lora_B["style"].basis.q[:, 1:].data_ptr()
    assert not any("lora_B" in name for name in model.state_dict())


def test_disjoint_columns_are_orthogonal_whatever_was_learned(layered):
    model, _ = layered
    model = get_peft_model(model, QRLoraConfig(r=3, columns="subject", target_modules=TARGETS), "subject")
    model.add_adapter("style", QRLoraConfig(r=3, columns="style", target_modules=TARGETS))
    for name in ("subject", "style"):
        randomise(model, name)
    for layer in layers_of(model).values():
        subject, style = (layer.get_delta_weight(name).detach().flatten(1) for name in ("subject", "style"))
        crossed = subject.T @ style
        assert_rounded(crossed, torch.zeros_like(crossed), terms=64, size=float(subject.norm() * style.norm()))


@pytest.mark.parametrize("columns", [("first", "first"), ("subject", "style")])
def test_weighted_sums_are_exact_and_of_the_columns_rank(layered, columns):
    model, _ = layered
    options = {"r": 3, "basis_rank": 6, "target_modules": TARGETS}
    model = get_peft_model(model, QRLoraConfig(columns=columns[0], lora_alpha=5, **options), "one")
    model.add_adapter("two", QRLoraConfig(columns=columns[1], use_rslora=True, **options))
    randomise(model, "one")
    randomise(model, "two")
    model.base_model.add_weighted_adapter(["one", "two"], [0.7, -1.5], "both")
    assert model.peft_config["both"].r == len({*resolve_columns(columns[0], 3), *resolve_columns(columns[1], 3)})
    for layer in layers_of(model).values():
        expected = 0.7 * layer.get_delta_weight("one") - 1.5 * layer.get_delta_weight("two")
        assert_rounded(layer.get_delta_weight("both"), expected, terms=32)
        assert layer.lora_B["both"].basis is layer.lora_B["one"].basis
    with pytest.raises(TunerError, match="in use"):
        model.base_model.add_weighted_adapter(["one", "two"], [1.0, 1.0], "both")
    with pytest.raises(TunerError, match="svd"):
        model.base_model.add_weighted_adapter(["one", "two"], [1.0, 1.0], "other", combination_type="svd")


@pytest.mark.parametrize(
    ("other", "got"),
    [
        ({"basis_rank": 7}, "(7, 'fast', 0)"),
        ({"algorithm": "exact"}, "(6, 'exact', 0)"),
        ({"basis_seed": 4}, "(6, 'fast', 4)"),
        ({"train_basis": True}, "trained"),
    ],
)
def test_sums_across_bases_are_refused_with_both_values(layered, other, got):
    model, _ = layered
    options = {"r": 3, "basis_rank": 6, "target_modules": TARGETS}
    model = get_peft_model(model, QRLoraConfig(**options), "one")
    model.add_adapter("two", QRLoraConfig(**{**options, **other}))
    with pytest.raises(TunerError, match=rf"(?s)one: \(6, 'fast', 0\).*{re.escape(got)}"):
        model.base_model.add_weighted_adapter(["one", "two"], [1.0, 1.0], "both")


def test_training_the_basis_is_the_published_difference(layered):
    model, inputs = layered
    model = get_peft_model(model, QRLoraConfig(r=3, columns="style", train_basis=True, target_modules=TARGETS))
    steps = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.02)
    for _ in range(3):
        steps.zero_grad()
        sum((out - 1).square().mean() for out in model(*inputs)).backward()
        steps.step()
    for layer in layers_of(model).values():
        basis = layer_basis(layer.get_base_layer().weight, 6)
        q, r = basis.q[:, 1::2], basis.r[1::2]
        trained_q, trained_r = q + layer.lora_B["default"].delta_q, r + layer.delta_r("default")
        assert bool(layer.lora_B["default"].delta_q.any())
        assert bool(layer.delta_r("default").any())
        scaling = layer.scaling["default"]
        expected = scaling * (trained_q @ trained_r - q @ r)
        size = float((trained_q @ trained_r).detach().abs().max())
        assert_rounded(layer.get_delta_weight("default").flatten(1), expected, terms=32, size=size)
    apart = model(*inputs)
    model.merge_adapter()
    for merged, unmerged in zip(model(*inputs), apart, strict=True):
        assert_rounded(merged, unmerged, terms=256)


@pytest.mark.filterwarnings("ignore:Adapter cannot be set when the model is merged:UserWarning")
def test_an_adapter_added_while_another_is_merged_gets_the_basis_of_the_base(layered):
    model, _ = layered
    model = get_peft_model(model, QRLoraConfig(r=3, target_modules=TARGETS), "one")
    expected = adapter_fingerprint(model, "one")
    randomise(model, "one")
    model.merge_adapter()
    model.add_adapter("two", QRLoraConfig(r=3, basis_seed=1, target_modules=TARGETS))
    assert basis_digests(model, "two") == basis_digests(model, "one")
    model.unmerge_adapter()
    assert adapter_fingerprint(model, "one") == expected


def test_a_base_without_values_gets_its_basis_when_they_arrive(layered):
    model, inputs = layered
    empty = Layered().to("meta")
    empty = get_peft_model(empty, QRLoraConfig(r=3, target_modules=TARGETS), low_cpu_mem_usage=True)
    with pytest.raises(TunerError, match=r"(?s)no basis yet.*meta"):
        basis_digests(empty, "default")
    empty.to_empty(device="cpu")
    for name, layer in layers_of(empty).items():
        layer.get_base_layer().load_state_dict(model.get_submodule(name.split(".")[-1]).state_dict())
        nn.init.zeros_(layer.lora_A["default"].weight)
    torch.testing.assert_close(empty(*inputs), model(*inputs), atol=0, rtol=0)
    expected = get_peft_model(model, QRLoraConfig(r=3, target_modules=TARGETS))
    assert adapter_fingerprint(empty, "default") == adapter_fingerprint(expected, "default")


def test_stock_lora_may_stand_beside_but_not_below(layered):
    model, inputs = layered
    stock = copy.deepcopy(model)
    inject_adapter_in_model(LoraConfig(r=3, target_modules=["linear"]), stock, "lora")
    with pytest.raises(TunerError, match=r"(?s)'linear' already carries a stock LoRA"):
        inject_adapter_in_model(QRLoraConfig(r=3, target_modules=["linear"]), stock, "qrlora")
    inject_adapter_in_model(QRLoraConfig(r=3, target_modules=["linear"]), model, "qrlora")
    inject_adapter_in_model(LoraConfig(r=3, target_modules=["linear"], init_lora_weights=False), model, "lora")
    randomise(model, "qrlora")
    for layer in layers_of(model).values():
        layer.set_adapter(["qrlora", "lora"])
    apart = model(*inputs)
    for layer in layers_of(model).values():
        layer.merge()
    for merged, unmerged in zip(model(*inputs), apart, strict=True):
        assert_rounded(merged, unmerged, terms=256)


class HQQLinear(nn.Module):
    """Looks to PEFT like a quantised Linear of the HQQ backend: codes of one byte and no plain weight."""

    def __init__(self, linear: nn.Linear):
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.scale = float(linear.weight.abs().max() / 127)
        self.W_q = nn.Parameter((linear.weight / self.scale).round().to(torch.int8), requires_grad=False)

    def dequantize(self) -> Tensor:
        return self.W_q * self.scale

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.dequantize().T


def test_a_quantised_base_trains_and_refuses_to_merge(layered):
    model, inputs = layered
    model.linear = HQQLinear(model.linear)
    before = model(*inputs)
    model = get_peft_model(model, QRLoraConfig(r=3, target_modules=TARGETS))
    torch.testing.assert_close(model(*inputs), before, atol=0, rtol=0)
    layer = layers_of(model)["base_model.model.linear"]
    assert torch.equal(layer.lora_B["default"].q, layer_basis(layer.get_base_layer().dequantize(), 3).q)
    conv = base_weights(model)["base_model.model.conv.weight"]
    for merge in (model.merge_adapter, model.merge_and_unload):
        with pytest.raises(TunerError, match=r"(?s)quantised HQQLinear.*keep the adapter unmerged"):
            merge()
        assert torch.equal(base_weights(model)["base_model.model.conv.weight"], conv)


def test_a_base_stored_in_eight_bit_floats_carries_an_adapter(sd3):
    model, inputs, targets = sd3
    model.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)
    before = predict(model, inputs)
    model.add_adapter(QRLoraConfig(r=2, target_modules=targets))
    assert torch.equal(predict(model, inputs), before)
    layer = model.transformer_blocks[0].attn.to_q
    assert layer.get_base_layer().weight.element_size() == 1
    assert layer.lora_A["default"].weight.dtype == layer.lora_B["default"].q.dtype == torch.float32
    predict(model, inputs).sum().backward()
    assert bool(layer.lora_A["default"].weight.grad.any())
    with pytest.raises(TunerError, match="quantised"):
        layer.merge()


def test_an_unreadable_quantised_base_is_refused(layered):
    model, _ = layered
    model.linear.weight = nn.Parameter(torch.ones(20, 24, dtype=torch.uint8), requires_grad=False)
    with pytest.raises(TunerError, match=r"(?s)cannot be read.*uint8"):
        get_peft_model(model, QRLoraConfig(r=3, target_modules=["linear"]))


@pytest.mark.skipif(torch.__version__ < "2.7", reason="torch 2.6 cannot compile PEFT's own forward in one graph")
def test_compiled_without_graph_breaks(layered, monkeypatch):
    model, inputs = layered
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # shape checks are no part of a graph
    model = get_peft_model(model, QRLoraConfig(r=3, columns="style", target_modules=TARGETS))
    randomise(model, "default")
    expected = model(*inputs)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for one, other in zip(compiled(*inputs), expected, strict=True):
        assert_rounded(one, other, terms=256)
    sum(out.sum() for out in compiled(*inputs)).backward()
    assert all(bool(layer.lora_A["default"].weight.grad.any()) for layer in layers_of(model).values())


def test_the_method_is_registered_once():
    tuner_package._register("QRLORA")
    from peft import PeftConfig, PeftType
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

    assert PeftType("QRLORA") is PeftType.QRLORA is PeftType["QRLORA"]
    assert PEFT_TYPE_TO_CONFIG_MAPPING[PeftType.QRLORA] is QRLoraConfig
    assert isinstance(PeftConfig.from_peft_type(peft_type="QRLORA", r=2), QRLoraConfig)
