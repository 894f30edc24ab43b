"""Adapters: what they count and say, their files in both spellings, and their way onto real diffusers models."""

from __future__ import annotations

import dataclasses
import json
import os
import signal

import pytest
import safetensors
import safetensors.torch
import torch
from diffusers import (
    FluxPipeline,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionXLPipeline,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model

from denoisers import ATTENTION, build, predict
from qrlora._files import write_atomically
from qrlora.apps.cli.inspect import describe
from qrlora.errors import AdapterFileError, MismatchError, OutputError, TunerError
from qrlora.method.adapter import Adapter, adapter_from_model, attach, load_adapter, save_adapter
from qrlora.method.adapter.attach import base_weights
from qrlora.method.adapter.file import pack, unpack
from qrlora.method.adapter.record import triangular_mask
from qrlora.method.basis import TURNED, VERSIONS, Basis, fingerprint, sketch, turned
from qrlora.method.composition import Composition, similarity
from qrlora.method.tuner import QRLoraConfig
from samples import NETWORK, SHAPES, assert_rounded, changed, delta_weights, make_adapter, make_basis, make_lora


@pytest.fixture(scope="module")
def basis(tmp_path_factory: pytest.TempPathFactory) -> Basis:
    return make_basis(tmp_path_factory.mktemp("basis"))


def assert_equal(one: Adapter, two: Adapter) -> None:
    """Bit for bit the same adapter, names aside."""
    assert one.metadata == two.metadata
    assert (one.shapes, one.digests, set(one.deltas)) == (two.shapes, two.digests, set(two.deltas))
    assert one.sketches == two.sketches
    assert all(torch.equal(one.deltas[name], two.deltas[name]) for name in one.deltas)
    assert (one.ups is None) == (two.ups is None)
    assert all(torch.equal(one.ups[name], two.ups[name]) for name in one.ups or {})


# The record


def test_parameters_are_those_of_the_triangle_and_half_of_lora_or_less(basis):
    columns = (1, 3, 5)
    triangular, dense = make_adapter(basis, columns), make_adapter(basis, columns, triangular=False)
    assert triangular.parameters().trained == sum(
        int(triangular_mask(triangular.columns(name), torch.Size(shape[1:]).numel()).sum())
        for name, shape in SHAPES.items()
    )
    # proj_out holds columns 0 to 2 of the basis, so one of this adapter's
    assert dense.parameters().trained == 3 * (16 + 40 + 36) + 20
    assert dense.parameters().lora_same_rank == 3 * (24 + 16 + 16 + 40 + 12 + 36 + 3 + 20)
    lora = make_lora(3).parameters()
    assert lora.trained == lora.lora_same_rank and lora.ratio == 1.0
    square = make_adapter(Basis.of({"a": torch.eye(32) + 1}, 8), tuple(range(8)), shapes={"a": (32, 32)})
    assert square.parameters().ratio == (8 * 32 - 28) / (8 * 64) < 0.5


def test_a_trained_basis_counts_q_and_the_triangle_of_r():
    lora = make_lora(4)
    both = changed(lora, method="qrlora_train_basis", triangular=True).parameters()
    assert both.trained == sum(2 * out + 2 * torch.Size(rest).numel() - 1 for out, *rest in SHAPES.values())
    assert both.lora_same_rank == make_lora(2).parameters().lora_same_rank


@pytest.mark.parametrize(
    "change",
    [
        {"deltas": {}},
        {"shapes": {}},
        {"digests": {}},
        {"ups": {}},
        {"deltas": {name: torch.ones(4, torch.Size(shape[1:]).numel()) for name, shape in SHAPES.items()}},
        {"deltas": {name: torch.zeros(4, 2) for name in SHAPES}},
        {"shapes": {name: (24,) for name in SHAPES}},
    ],
)
def test_an_adapter_that_contradicts_itself_is_refused(basis, change):
    with pytest.raises(AdapterFileError):
        dataclasses.replace(make_adapter(basis), **change)


@pytest.mark.parametrize("change", [{"rank": 0}, {"role": "hero"}, {"columns": (0, 1)}, {"alpha": float("inf")}])
def test_metadata_that_contradicts_itself_is_refused(basis, change):
    with pytest.raises(AdapterFileError):
        changed(make_adapter(basis), **change)


def test_a_basis_of_another_rank_or_weight_does_not_fit(basis, tmp_path):
    adapter = make_adapter(basis)
    adapter.check_basis(basis)
    for options in ({"rank": 9}, {"seed": 5}, {"algorithm": "exact"}):
        with pytest.raises(MismatchError, match="expected"):
            adapter.check_basis(make_basis(tmp_path, **options))
    with pytest.raises(MismatchError, match="Q of its whole basis"):
        adapter.delta_weight("conv")


def test_a_q_that_came_out_otherwise_is_refused(basis):
    """As from nearly equal singular values on other hardware, or from a cache that was tampered with."""
    adapter = make_adapter(basis)
    turning = torch.linalg.matrix_exp(torch.tensor([[0.0, -0.1], [0.1, 0.0]]))  # of two columns, by 0.1 radians
    for angle, refused in ((1.0, True), (0.02, False)):
        layers = {}
        for name, layer in basis.items():
            q = layer.q.clone()
            q[:, :2] = layer.q[:, :2] @ (torch.eye(2) + angle * (turning - torch.eye(2)))
            layers[name] = dataclasses.replace(layer, q=q)
        moved = Basis(layers, basis.digests, basis.rank, basis.algorithm, basis.seed)
        assert moved.fingerprint == basis.fingerprint
        other = make_adapter(moved)
        if refused:
            with pytest.raises(MismatchError, match="another Q than it was trained on"):
                adapter.check_basis(moved)
            with pytest.raises(MismatchError, match="sketches_of_q"):
                Composition([(adapter, 1.0), (other, 1.0)])
        else:
            adapter.check_basis(moved)
            Composition([(adapter, 1.0), (other, 1.0)])


def test_sketches_estimate_how_far_columns_turned():
    generator = torch.Generator().manual_seed(0)
    q = torch.linalg.qr(torch.randn(200, 16, generator=generator)).Q
    for size in (1e-3, 1e-2, 0.3):
        found = []
        for _ in range(64):
            moved = torch.linalg.qr(q + size * torch.randn(200, 16, generator=generator) / 200**0.5).Q
            moved *= torch.where((moved * q).sum(0) < 0, -1.0, 1.0)
            found.append(turned(sketch(q), sketch(moved)) / float((q - moved).norm() / 4))
        assert 0.7 < sum(found) / len(found) < 1.2  # of three numbers: their mean square is what is unbiased
    assert sketch(q) == sketch(q.double()) and turned(sketch(q), sketch(q.bfloat16())) < TURNED / 3


@pytest.mark.parametrize(
    ("shape", "frozen"),
    [
        ((6, 2), (-1.4836, -0.91507, -0.69497)),
        ((40, 3), (-1.74839, -0.65718, -0.12713)),
        ((3072, 64), (1.07202, -0.96892, -0.84795)),
        ((6, 2), (-1.4836, -0.91507, -0.69497)),
    ],
)
def test_sketches_are_those_that_files_hold(shape, frozen):
    """Columns of the identity, whose sketches are sums that no library rounds differently."""
    assert sketch(torch.eye(*shape)) == frozen


def test_an_adapter_file_without_sketches_is_still_read(basis, tmp_path):
    adapter = dataclasses.replace(make_adapter(basis), sketches={})
    save_adapter(adapter, tmp_path / "a.safetensors")
    assert load_adapter(tmp_path / "a.safetensors").sketches == {}


# Files


@given(data=st.data())
@settings(max_examples=50, deadline=None)
def test_packing_is_undone_by_unpacking(data):
    columns = tuple(sorted(data.draw(st.sets(st.integers(0, 9), min_size=1))))
    width = data.draw(st.integers(10, 14))
    delta = torch.randn(len(columns), width) * triangular_mask(columns, width)
    packed = pack(delta, columns)
    assert packed.numel() == sum(width - column for column in columns)
    assert torch.equal(unpack(packed, columns, width), delta)


FIELDS = {
    "role": "subject",
    "trigger": "<c> ünï",
    "licence": "CC-BY-4.0",
    "recipe": {"steps": 3, "learning_rate": 1e-4, "note": 'a "quoted" word'},
    "provenance": {"images": ["sha256:0"]},
    "base_digest": "d",
    "denoiser": "unet",
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("triangular", [True, False])
def test_the_compact_spelling_comes_back_bit_for_bit(basis, tmp_path, triangular, dtype):
    adapter = make_adapter(basis, (0, 2, 5), alpha=1.3, triangular=triangular, **FIELDS)
    adapter = dataclasses.replace(adapter, deltas={name: delta.to(dtype) for name, delta in adapter.deltas.items()})
    save_adapter(adapter, tmp_path / "mine.safetensors")
    loaded = load_adapter(tmp_path / "mine.safetensors")
    assert_equal(loaded, adapter)
    assert loaded.name == "mine" and loaded.digest == adapter.digest


def test_the_lora_spelling_is_the_same_adapter_with_its_scaling_folded_in(basis, tmp_path):
    adapter = make_adapter(basis, (0, 2, 5), alpha=1.3, **FIELDS)
    save_adapter(adapter, tmp_path / "mine.safetensors", "lora", basis)
    loaded = load_adapter(tmp_path / "mine.safetensors")
    assert loaded.metadata == dataclasses.replace(adapter.metadata, alpha=3.0) and loaded.ups is None
    assert loaded.digest == adapter.digest
    for name, delta in delta_weights(adapter, basis).items():
        assert_rounded(loaded.delta_weight(name, basis[name].q), delta, terms=16)


def test_the_lora_spelling_has_the_keys_and_shapes_of_its_ecosystem(basis, tmp_path):
    save_adapter(make_adapter(basis, **FIELDS), tmp_path / "mine.safetensors", "lora", basis)
    tensors = safetensors.torch.load_file(tmp_path / "mine.safetensors")
    assert {key: tuple(value.shape) for key, value in tensors.items() if "conv" in key} == {
        "unet.conv.lora_A.weight": (4, 4, 3, 3),
        "unet.conv.lora_B.weight": (12, 4, 1, 1),
    }
    assert len(tensors) == 2 * len(SHAPES) and not any("alpha" in key for key in tensors)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_lora_spelling_survives_half_precision(basis, tmp_path, dtype):
    adapter = make_adapter(basis)
    adapter = dataclasses.replace(adapter, deltas={name: delta.to(dtype) for name, delta in adapter.deltas.items()})
    save_adapter(adapter, tmp_path / "mine.safetensors", "lora", basis)
    assert_equal(load_adapter(tmp_path / "mine.safetensors"), adapter)


def test_the_lora_spelling_needs_the_right_basis(basis, tmp_path):
    path = tmp_path / "mine.safetensors"
    for wrong in (None, make_basis(tmp_path, seed=5)):
        with pytest.raises(MismatchError, match="expected"):
            save_adapter(make_adapter(basis), path, "lora", wrong)
    assert not path.exists()


def test_a_plain_lora_of_ours_comes_back(tmp_path):
    adapter = make_lora(alpha=3.0, role="style", family="sd3")
    save_adapter(adapter, tmp_path / "mine.safetensors", "lora")
    assert_equal(load_adapter(tmp_path / "mine.safetensors"), adapter)


def test_the_plain_lora_of_others_is_read_at_its_strength(tmp_path):
    lora = make_lora(3)
    tensors = {}
    for name, shape in SHAPES.items():
        ones = (1,) * (len(shape) - 2)
        tensors[f"unet.{name}.lora_A.weight"] = lora.deltas[name].reshape(3, *shape[1:])
        tensors[f"unet.{name}.lora_B.weight"] = lora.ups[name].reshape(-1, 3, *ones)
    for metadata, scaling in (
        (None, 1.0),
        ({"format": "pt"}, 1.0),
        ({"lora_adapter_metadata": json.dumps({"unet.r": 3, "unet.lora_alpha": 6})}, 2.0),
    ):
        safetensors.torch.save_file(tensors, tmp_path / "theirs.safetensors", metadata)
        loaded = load_adapter(tmp_path / "theirs.safetensors")
        assert (loaded.metadata.method, loaded.metadata.denoiser, loaded.scaling) == ("lora", "unet", scaling)
        for name in SHAPES:
            assert_rounded(loaded.delta_weight(name), scaling * lora.delta_weight(name), terms=16)


def test_a_composition_is_saved_like_any_adapter(basis, tmp_path):
    parts = [(make_adapter(basis, (0, 2), role="subject"), 0.9), (make_adapter(basis, (1, 3), role="style"), -0.5)]
    composed = Composition(parts).adapter()
    save_adapter(composed, tmp_path / "both.safetensors")
    assert_equal(load_adapter(tmp_path / "both.safetensors"), composed)


def test_a_compact_file_is_at_most_half_of_a_lora_file_on_square_layers(tmp_path):
    shapes = {f"transformer_blocks.{i}.attn.to_{letter}": (256, 256) for i in range(2) for letter in "qkv"}
    weights = {name: torch.randn(shape) for name, shape in shapes.items()}
    basis = Basis.of(weights, 32)
    adapter = make_adapter(basis, tuple(range(0, 32, 2)), shapes=shapes)
    save_adapter(adapter, tmp_path / "compact.safetensors")
    lora = {f"transformer.{n}.lora_{side}.weight": torch.zeros(16, 256) for n in shapes for side in "AB"}
    safetensors.torch.save_file(lora, tmp_path / "lora.safetensors")
    sizes = [(tmp_path / f"{name}.safetensors").stat().st_size for name in ("compact", "lora")]
    assert sizes[0] <= 0.5 * sizes[1]


# Interrupted writes


@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(basis, tmp_path, monkeypatch, step):
    folder = tmp_path / "adapters"
    folder.mkdir()
    old, new = make_adapter(basis), make_adapter(basis, seed=9)
    save_adapter(old, folder / "mine.safetensors")

    def fail(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, step, fail)
    with pytest.raises(OutputError, match="No space left"):
        save_adapter(new, folder / "mine.safetensors")
    assert [path.name for path in folder.iterdir()] == ["mine.safetensors"]
    assert_equal(load_adapter(folder / "mine.safetensors"), old)


def test_ctrl_c_during_a_write_leaves_the_old_file(basis, tmp_path, monkeypatch):
    save_adapter(make_adapter(basis), tmp_path / "mine.safetensors")

    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupt)
    with pytest.raises(KeyboardInterrupt):
        save_adapter(make_adapter(basis, seed=9), tmp_path / "mine.safetensors")
    assert_equal(load_adapter(tmp_path / "mine.safetensors"), make_adapter(basis))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
def test_a_killed_writer_leaves_the_old_file(basis, tmp_path):
    save_adapter(make_adapter(basis), tmp_path / "mine.safetensors")
    child = os.fork()
    if child == 0:
        os.fsync = lambda _: os.kill(os.getpid(), signal.SIGKILL)
        try:
            write_atomically(tmp_path / "mine.safetensors", b"half a file")
        finally:
            os._exit(1)
    assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL
    assert len(list(tmp_path.iterdir())) == 2  # what the killed one left has a name that nothing reads
    assert_equal(load_adapter(tmp_path / "mine.safetensors"), make_adapter(basis))
    save_adapter(make_adapter(basis, seed=9), tmp_path / "mine.safetensors")
    assert len(list(tmp_path.iterdir())) == 1  # and the next writer removes it


# Onto models and off again


PIPELINES = {
    "sd3": (StableDiffusion3Pipeline, "transformer"),
    "flux": (FluxPipeline, "transformer"),
    "unet": (StableDiffusionXLPipeline, "unet"),
}


def sd3() -> SD3Transformer2DModel:
    return build("sd3")[0]


def output(model) -> torch.Tensor:
    """Of a tiny SD3 denoiser."""
    return predict(model, build("sd3")[1])


def random_adapter(model, targets, **fields) -> Adapter:
    """An adapter that nobody trained: random ΔR on `model`'s basis. The model keeps it as adapter "random"."""
    options = {"r": 4, "lora_alpha": 6, "columns": "style", "init_lora_weights": False, "target_modules": targets}
    model.add_adapter(QRLoraConfig(**options), "random")
    return adapter_from_model(model, "random", **fields)


def model_basis(model, adapter: Adapter) -> Basis:
    meta = adapter.metadata
    weights = {name: model.get_submodule(name).weight for name in adapter.deltas}
    return Basis.of(weights, meta.basis_rank, algorithm=meta.algorithm, seed=meta.basis_seed)


@pytest.mark.parametrize("kind", PIPELINES)
@torch.no_grad()
def test_every_road_onto_a_real_denoiser_gives_the_same_output(kind, tmp_path):
    pipeline, denoiser = PIPELINES[kind]
    original, inputs, targets = build(kind)
    base = predict(original, inputs)
    adapter = random_adapter(original, targets, denoiser=denoiser)
    expected = predict(original, inputs)
    assert not torch.allclose(expected, base, atol=1e-3)

    def assert_reproduces(model):
        assert_rounded(predict(model, inputs), expected, terms=NETWORK)

    save_adapter(adapter, tmp_path / "compact.safetensors")
    attached = build(kind)[0]
    attach(attached, load_adapter(tmp_path / "compact.safetensors"), "mine")
    assert torch.equal(predict(attached, inputs), expected)

    basis = model_basis(build(kind)[0], adapter)
    save_adapter(adapter, tmp_path / "lora.safetensors", "lora", basis)
    from_lora = build(kind)[0]
    attach(from_lora, load_adapter(tmp_path / "lora.safetensors"), "mine")
    assert_reproduces(from_lora)

    stock = build(kind)[0]
    options = {"unet_config": stock.config} if kind == "unet" else {}
    state = pipeline.lora_state_dict(tmp_path / "lora.safetensors", **options)
    stock.load_lora_adapter(state[0] if isinstance(state, tuple) else state, prefix=denoiser)
    assert_reproduces(stock)

    by_hand = build(kind)[0]
    for name in adapter.deltas:
        weight = by_hand.get_submodule(name).weight
        weight += adapter.delta_weight(name, basis[name].q).reshape(weight.shape)
    assert_reproduces(by_hand)


@torch.no_grad()
def test_stock_load_lora_weights_paints_the_same_picture(tiny_sd3, tmp_path):
    def picture(prepare):
        pipe = StableDiffusion3Pipeline.from_pretrained(tiny_sd3, text_encoder_3=None, tokenizer_3=None)
        pipe.set_progress_bar_config(disable=True)
        prepare(pipe)
        generator = torch.Generator().manual_seed(3)
        options = {"num_inference_steps": 2, "max_sequence_length": 1, "output_type": "pt", "height": 16, "width": 16}
        return pipe("a mug", generator=generator, **options).images

    files = {spelling: tmp_path / f"{spelling}.safetensors" for spelling in ("compact", "lora")}

    def make(pipe):
        basis_of = pipe.transformer
        adapter = random_adapter(basis_of, [*ATTENTION, "ff.net.2"], family="sd3")
        basis_of.delete_adapters("random")
        basis_of = StableDiffusion3Pipeline.from_pretrained(tiny_sd3, text_encoder_3=None, tokenizer_3=None).transformer
        save_adapter(adapter, files["compact"])
        save_adapter(adapter, files["lora"], "lora", model_basis(basis_of, adapter))

    base = picture(make)
    ours = picture(lambda pipe: attach(pipe.transformer, load_adapter(files["compact"])))
    again = picture(lambda pipe: attach(pipe.transformer, load_adapter(files["lora"])))
    stock = picture(lambda pipe: pipe.load_lora_weights(files["lora"]))
    assert (ours - base).abs().max() > 0.01
    for other in (again, stock):  # two steps of the denoiser, and the autoencoder
        assert_rounded(other, ours, terms=3 * NETWORK)


@pytest.mark.filterwarnings("ignore:Already found a `peft_config`")
@torch.no_grad()
def test_a_composition_attached_is_its_parts_side_by_side():
    model = sd3()
    parts = []
    for name, weight in (("subject", 0.8), ("style", -0.5)):
        config = QRLoraConfig(r=3, lora_alpha=3, columns=name, init_lora_weights=False, target_modules=ATTENTION)
        model.add_adapter(config, name)
        parts.append((adapter_from_model(model, name, role=name), weight))
    model.set_adapters(["subject", "style"], [0.8, -0.5])
    together = sd3()
    attach(together, Composition(parts).adapter(), "both")
    assert_rounded(output(together), output(model), terms=NETWORK)
    # What was turned down for generating is not turned down in the file.
    assert adapter_from_model(model, "style").scaling == 1.0


@torch.no_grad()
def test_a_peft_model_takes_and_gives_adapters_too():
    config = QRLoraConfig(r=4, init_lora_weights=False, target_modules=ATTENTION)
    model = get_peft_model(sd3(), config)
    adapter = adapter_from_model(model, "default")
    assert all(name.startswith("transformer_blocks.") for name in adapter.deltas)
    bare = sd3()
    attach(bare, adapter)
    assert torch.equal(output(bare), output(model))
    attach(model, adapter, "again")
    assert model.active_adapter == "again"
    assert torch.equal(output(bare), output(model))


@torch.no_grad()
def test_any_module_takes_an_adapter_and_keeps_it_frozen():
    def fresh():
        torch.manual_seed(0)
        return torch.nn.Sequential(torch.nn.Linear(12, 12), torch.nn.Conv1d(5, 8, 3))

    x, model = torch.randn(2, 5, 12), fresh()
    model = get_peft_model(model, QRLoraConfig(r=3, init_lora_weights=False, target_modules=["0", "1"]))
    adapter = adapter_from_model(model)
    bare = fresh()
    attach(bare, adapter)
    assert torch.equal(bare(x), model(x)) and not torch.equal(bare(x), fresh()(x))
    assert not any(parameter.requires_grad for name, parameter in bare.named_parameters() if "lora" in name)


@pytest.mark.parametrize("method", ["lora", "qrlora_train_basis"])
@torch.no_grad()
def test_adapters_with_their_own_ups_travel_as_lora(method, tmp_path):
    options = {"r": 3, "lora_alpha": 6, "target_modules": ATTENTION, "init_lora_weights": False}
    model = sd3()
    if method == "lora":
        model.add_adapter(LoraConfig(**options), "mine")
    else:
        model.add_adapter(QRLoraConfig(**options, train_basis=True), "mine")
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    adapter = adapter_from_model(model, "mine")
    assert adapter.metadata.method == method
    assert adapter.parameters().ratio <= 1.0
    save_adapter(adapter, tmp_path / "mine.safetensors", "lora")
    for loaded in (adapter, load_adapter(tmp_path / "mine.safetensors")):
        other = sd3()
        attach(other, loaded, "theirs")
        assert_rounded(output(other), output(model), terms=NETWORK)
    stock = sd3()
    stock.load_lora_adapter(safetensors.torch.load_file(tmp_path / "mine.safetensors"))
    assert_rounded(output(stock), output(model), terms=NETWORK)


def test_another_base_model_is_refused_and_left_untouched():
    adapter = random_adapter(sd3(), ATTENTION, base_model="the-one")
    other = sd3()
    with torch.no_grad():
        other.transformer_blocks[1].attn.to_k.weight[0, 0] += 1e-3
    with pytest.raises(MismatchError) as caught:
        attach(other, adapter)
    message = str(caught.value)
    assert adapter.metadata.basis_fingerprint in message and "the-one" in message
    assert f"1 of {len(adapter.deltas)} weights differ, first transformer_blocks.1.attn.to_k" in message
    assert not hasattr(other, "peft_config") and type(other.transformer_blocks[0].attn.to_q) is torch.nn.Linear


def test_a_denoiser_whose_q_came_out_otherwise_is_refused_and_left_untouched():
    model, inputs, targets = build("sd3")
    model.add_adapter(QRLoraConfig(r=4, target_modules=targets, init_lora_weights=False), "a")
    adapter = adapter_from_model(model, "a")
    assert set(adapter.sketches) == set(adapter.deltas)
    first = next(iter(adapter.sketches))
    strange = dataclasses.replace(adapter, sketches={**adapter.sketches, first: (1.0, 2.0, 3.0)})
    config = QRLoraConfig(r=2, target_modules=targets)
    bare, wrapped = build("sd3")[0], get_peft_model(build("sd3")[0], config, "other")
    for fresh in (bare, wrapped):
        before, names = predict(fresh, inputs), [name for name, _ in fresh.named_parameters()]
        with pytest.raises(MismatchError, match="another Q than it was trained on"):
            attach(fresh, strange)
        assert [name for name, _ in fresh.named_parameters()] == names
        assert torch.equal(predict(fresh, inputs), before)
        attach(fresh, adapter)
        assert_rounded(predict(fresh, inputs), predict(model, inputs), terms=NETWORK)


def test_an_adapter_of_an_older_version_of_the_basis_is_refused_everywhere(tmp_path):
    """Its Q is another one. The file itself is well-formed, and still says what it is."""
    model = sd3()
    adapter = random_adapter(model, ATTENTION, base_model="the-one")
    meta = adapter.metadata
    old = fingerprint(adapter.digests, meta.basis_rank, meta.algorithm, meta.basis_seed, version=1)
    save_adapter(changed(adapter, basis_fingerprint=old), tmp_path / "old.safetensors")
    loaded = load_adapter(tmp_path / "old.safetensors")
    assert (loaded.basis_version, adapter.basis_version) == (1, VERSIONS["fast"])
    assert describe(tmp_path / "old.safetensors", loaded)["basis"].count("version 1, which this qrlora does not make")
    basis = Basis.of(base_weights(model, adapter.deltas), meta.basis_rank)
    adapter.check_basis(basis)
    for use in (
        lambda: attach(sd3(), loaded),
        lambda: loaded.check_basis(basis),
        lambda: save_adapter(loaded, tmp_path / "lora.safetensors", "lora", basis),
        lambda: Composition([(loaded, 1.0)]),
    ):
        with pytest.raises(MismatchError, match=r"(?s)does not make.*version 2.*version 1.*train it again"):
            use()
    assert "delta_w" not in similarity(loaded, adapter).total
    assert not (tmp_path / "lora.safetensors").exists()


def test_another_architecture_is_refused():
    adapter = random_adapter(sd3(), ATTENTION)
    with pytest.raises(MismatchError, match="lacks") as caught:
        attach(build("flux")[0], adapter)
    assert "transformer_blocks.1.attn.to_q" in str(caught.value)
    model = sd3()
    model.transformer_blocks[0].attn.to_q = torch.nn.Linear(32, 48)
    with pytest.raises(MismatchError, match="other shapes"):
        attach(model, adapter)


def test_a_name_in_use_and_a_name_not_there_are_refused():
    model = sd3()
    adapter = random_adapter(model, ATTENTION)
    with pytest.raises(TunerError, match="in use"):
        attach(model, adapter, "random")
    with pytest.raises(TunerError, match="random"):
        adapter_from_model(model, "absent")
    with pytest.raises(TunerError, match="absent"):
        adapter_from_model(sd3(), "absent")


def test_a_stock_lora_in_the_way_is_said_before_anything_is_changed():
    adapter = random_adapter(sd3(), ATTENTION)
    model = sd3()
    model.add_adapter(LoraConfig(r=2, target_modules=["to_q"]), "stock")
    with pytest.raises(TunerError, match="attach the QR-LoRA adapter first"):
        attach(model, adapter, "mine")
    assert list(model.peft_config) == ["stock"]


@pytest.mark.parametrize("option", [{"use_dora": True}, {"lora_bias": True}, {"rank_pattern": {"to_q": 2}}])
def test_what_a_file_could_not_hold_is_refused(option):
    model = sd3()
    model.add_adapter(LoraConfig(r=4, target_modules=ATTENTION, **option), "mine")
    with pytest.raises(TunerError):
        adapter_from_model(model, "mine")
