"""What PEFT promises of any method, on every kind of layer; after the custom-model suite in PEFT's source release."""

from __future__ import annotations

import copy

import pytest
import torch
from peft import PeftModel, PeftType, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from peft.utils.hotswap import hotswap_adapter
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from qrlora.errors import TunerError
from qrlora.method.tuner import QRLoraConfig, QRLoraLayer
from samples import EPS, assert_rounded

pytestmark = pytest.mark.filterwarnings(
    "ignore:Adapter .* was active which is now deleted:UserWarning",
    "ignore:Unable to fetch remote file:UserWarning",
)


class Small(nn.Module):
    """The adapted layer between an embedding of the input and a linear head."""

    def __init__(self, layer: nn.Module, shape: tuple[int, ...]):
        super().__init__()
        self.shape = shape
        self.stem = nn.Linear(6, int(torch.tensor(shape).prod()))
        self.layer = layer
        self.head = nn.LazyLinear(5)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.stem(x)).reshape(len(x), *self.shape)
        return self.head(torch.tanh(self.layer(x)).flatten(1))


LAYERS = {
    "linear": (lambda: nn.Linear(10, 12), (10,)),
    "small": (lambda: nn.Linear(10, 2), (10,)),
    "small conv": (lambda: nn.Conv2d(1, 8, (1, 2)), (1, 3, 4)),
    "transposed": (lambda: Conv1D(12, 10), (3, 10)),
    "conv1d": (lambda: nn.Conv1d(4, 8, 3), (4, 7)),
    "conv2d": (lambda: nn.Conv2d(3, 9, 3, padding=1, stride=2), (3, 6, 6)),
    "conv1x1": (lambda: nn.Conv2d(8, 9, 1), (8, 3, 3)),
    "conv3d": (lambda: nn.Conv3d(2, 7, 2, padding_mode="circular", padding=1), (2, 3, 3, 3)),
}
OPTIONS = {
    "plain": {},
    "dense": {"triangular": False, "use_rslora": True},
    "style": {"columns": "style", "lora_alpha": 3},
    "trained": {"train_basis": True},
    "head saved": {"modules_to_save": ["head"]},
}

X = torch.randn(4, 6, generator=torch.Generator().manual_seed(5))


def base(kind: str = "linear") -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        layer, shape = LAYERS[kind]
        model = Small(layer(), shape).eval()
        model(X)
        return model


def config(**options) -> QRLoraConfig:
    return QRLoraConfig(**{"r": 3, "target_modules": ["layer"], "init_lora_weights": False, **options})


@pytest.fixture(params=LAYERS)
def kind(request):
    return request.param


@pytest.fixture(params=OPTIONS)
def options(request):
    return OPTIONS[request.param]


def tuned(kind: str = "linear", **options) -> PeftModel:
    torch.manual_seed(1)
    model = get_peft_model(base(kind), config(**options)).eval()
    with torch.no_grad():  # a trained basis starts at zero whatever ΔR is
        for name, parameter in model.named_parameters():
            if "delta_q" in name:
                parameter.normal_(std=0.3)
    return model


def close(first: Tensor, second: Tensor) -> None:
    assert_rounded(first, second, terms=64)


def test_training_reaches_the_adapter_and_nothing_else(kind, options):
    model = tuned(kind, **options)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    trainable = [name for name, p in model.named_parameters() if p.requires_grad]
    assert all("lora_" in name or "modules_to_save" in name for name in trainable)
    assert model.get_nb_trainable_parameters()[0] == sum(before[name].numel() for name in trainable)
    steps = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    model(X).square().sum().backward()
    steps.step()
    changed = [name for name, value in model.state_dict().items() if not torch.equal(value, before[name])]
    assert sorted(changed) == sorted(trainable)


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_saved_and_loaded_it_is_the_same_adapter(kind, options, low_cpu_mem_usage, tmp_path):
    model = tuned(kind, **options)
    expected = model(X)
    model.save_pretrained(tmp_path)
    names = {name.removeprefix("base_model.model.") for name in load_file(tmp_path / "adapter_model.safetensors")}
    ours = {"layer.lora_A.weight"} | ({"layer.lora_B.delta_q"} if options.get("train_basis") else set())
    assert names == ours | ({"head.weight", "head.bias"} if "modules_to_save" in options else set())
    loaded = PeftModel.from_pretrained(base(kind), tmp_path, low_cpu_mem_usage=low_cpu_mem_usage).eval()
    assert loaded.peft_config["default"].peft_type == PeftType.QRLORA
    assert torch.equal(loaded(X), expected)
    assert not any(p.requires_grad for p in loaded.parameters())


def test_state_dict_round_trip_under_another_name(kind):
    model = tuned(kind)
    other = get_peft_model(base(kind), config(init_lora_weights=True), adapter_name="other").eval()
    close(other(X), base(kind)(X))
    outcome = set_peft_model_state_dict(other, get_peft_model_state_dict(model), adapter_name="other")
    assert not outcome.unexpected_keys
    assert torch.equal(other(X), model(X))


@pytest.mark.parametrize("options", [o for o in OPTIONS.values() if "modules_to_save" not in o])
@pytest.mark.parametrize("safe_merge", [False, True])
def test_merge_unmerge_disable_and_unload(kind, options, safe_merge):
    plain = base(kind)
    weight, untouched = plain.layer.weight.clone(), plain(X)
    model = tuned(kind, **options)
    apart = model(X)
    assert not torch.allclose(apart, untouched, atol=1e-3)
    with model.disable_adapter():
        assert torch.equal(model(X), untouched)
    model.merge_adapter(safe_merge=safe_merge)
    close(model(X), apart)
    with model.disable_adapter():
        assert torch.equal(model(X), untouched)
    model.unmerge_adapter()
    assert torch.equal(model.base_model.model.layer.get_base_layer().weight, weight)
    assert torch.equal(model(X), apart)
    merged = copy.deepcopy(model).merge_and_unload(safe_merge=safe_merge)
    assert type(merged.layer) is type(plain.layer)
    close(merged(X), apart)
    assert torch.equal(model.unload()(X), untouched)


@pytest.mark.parametrize("numbers", [1, 25])
def test_merging_some_rows_at_a_time_is_merging_them_all(kind, numbers, monkeypatch):
    model = tuned(kind)
    layer = model.base_model.model.layer
    weight = layer.get_base_layer().weight
    before, expected = weight.clone(), weight + layer.get_delta_weight("default")
    monkeypatch.setattr("qrlora.method.tuner.layer.MERGED_AT_ONCE", numbers)
    layer.merge(safe_merge=True)
    close(weight, expected)
    layer.unmerge()
    assert torch.equal(weight, before)


def test_a_broken_adapter_is_not_merged_safely(kind):
    model = tuned(kind)
    layer = model.base_model.model.layer
    weight = layer.get_base_layer().weight.clone()
    with torch.no_grad():
        layer.lora_A["default"].weight.fill_(torch.nan)
    with pytest.raises(ValueError, match="NaNs detected in the merged weights"):
        model.merge_adapter(safe_merge=True)
    assert torch.equal(layer.get_base_layer().weight, weight)
    assert not layer.merged


@pytest.mark.parametrize("second", [{}, {"columns": "style"}, {"basis_seed": 3}, {"r": 2, "triangular": False}])
def test_several_adapters_add_up_and_switch(kind, second):
    model = tuned(kind)
    model.add_adapter("second", config(**second))
    layer: QRLoraLayer = model.base_model.model.layer
    first_alone = model(X)
    model.set_adapter("second")
    second_alone = model(X)
    assert not torch.allclose(first_alone, second_alone, atol=1e-3)
    assert {n for n, p in model.named_parameters() if p.requires_grad} == {
        "base_model.model.layer.lora_A.second.weight"
    }
    model.base_model.set_adapter(["default", "second"])
    both = model(X)
    model.merge_adapter()
    close(model(X), both)
    model.unmerge_adapter()
    delta = layer.get_delta_weight("default") + layer.get_delta_weight("second")
    rebuilt = base(kind)
    with torch.no_grad():
        rebuilt.layer.weight += delta
    close(rebuilt(X), both)
    model.delete_adapter("default")
    assert set(layer.lora_A) == set(layer.lora_B) == {"second"}
    assert torch.equal(model(X), second_alone)


def test_one_batch_may_mix_adapters(kind):
    model = tuned(kind)
    model.add_adapter("second", config(columns="style"))
    alone = {"__base__": base(kind)(X)}
    for name in ("default", "second"):
        model.set_adapter(name)
        alone[name] = model(X)
    names = ["second", "__base__", "default", "second"]
    mixed = model(X, adapter_names=names)
    close(mixed, torch.stack([alone[name][row] for row, name in enumerate(names)]))


def test_hot_swap_replaces_delta_r_alone(kind, tmp_path):
    incoming = tuned(kind)
    with torch.no_grad():
        incoming.base_model.model.layer.lora_A["default"].weight.mul_(-2)
    incoming.save_pretrained(tmp_path / "same")
    model = tuned(kind)
    q = model.base_model.model.layer.lora_B["default"].q
    hotswap_adapter(model, str(tmp_path / "same"), adapter_name="default", torch_device="cpu")
    assert torch.equal(model(X), incoming(X))
    assert torch.equal(model.base_model.model.layer.lora_B["default"].q, q)
    tuned(kind, columns="style").save_pretrained(tmp_path / "style")
    with pytest.raises(ValueError, match="columns"):
        hotswap_adapter(model, str(tmp_path / "style"), adapter_name="default", torch_device="cpu")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("autocast", [True, False])
def test_every_dtype_runs_merges_and_unmerges(kind, dtype, autocast):
    plain = base(kind).to(dtype)
    weight = plain.layer.weight.clone()
    model = get_peft_model(plain, config(), autocast_adapter_dtype=autocast).eval()
    x = X.to(dtype)
    apart = model(x)
    assert apart.dtype == dtype
    model.merge_adapter()
    # merged, the weight is rounded to its dtype; a ΔR that stays in float32 beside it, to that at best
    rounding = max(torch.finfo(dtype).eps, EPS) * 32 * float(apart.detach().abs().max())
    torch.testing.assert_close(model(x), apart, atol=rounding, rtol=0)
    model.unmerge_adapter()
    assert torch.equal(plain.layer.get_base_layer().weight, weight)


def test_dropout_acts_in_training_only():
    model = tuned(lora_dropout=0.5)
    assert torch.equal(model(X), model(X))
    model.train()
    assert not torch.equal(model(X), model(X))


def test_rank_and_alpha_patterns():
    model = get_peft_model(
        nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 7)),
        QRLoraConfig(r=2, lora_alpha=4, target_modules=["0", "1"], rank_pattern={"1": 3}, alpha_pattern={"0": 8}),
    )
    first, second = (layer for layer in model.modules() if isinstance(layer, QRLoraLayer))
    assert (first.r["default"], first.scaling["default"]) == (2, 4.0)
    assert (second.r["default"], second.scaling["default"]) == (3, 4 / 3)


def test_sums_of_rank_patterns_need_the_same_columns():
    patterned = {"r": 2, "target_modules": ["layer"], "rank_pattern": {"layer": 3}}
    model = get_peft_model(base(), QRLoraConfig(**patterned, basis_rank=6))
    model.add_adapter("same", QRLoraConfig(**patterned, basis_rank=6))
    model.add_adapter("style", QRLoraConfig(**patterned, columns="style"))
    model.base_model.add_weighted_adapter(["default", "same"], [1.0, 2.0], "sum")
    layer = model.base_model.model.layer
    assert (layer.r["sum"], layer.scaling["sum"]) == (3, 1.0)
    with pytest.raises(TunerError, match="rank_pattern"):
        model.base_model.add_weighted_adapter(["default", "style"], [1.0, 2.0], "union")


def test_a_frozen_adapter_stays_frozen():
    model = get_peft_model(base(), config(inference_mode=True))
    assert not any(p.requires_grad for p in model.parameters())
    model.base_model.set_requires_grad("default", True)
    assert [n for n, p in model.named_parameters() if p.requires_grad] == [
        "base_model.model.layer.lora_A.default.weight"
    ]
