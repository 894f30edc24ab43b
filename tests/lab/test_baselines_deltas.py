"""ΔW as it is kept, written and applied."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from denoisers import build, predict, same, state
from qrlora.errors import AdapterFileError, MismatchError
from qrlora.lab.baselines.deltas import (
    Delta,
    Learned,
    Overlay,
    applied,
    inner,
    load_learned,
    save_learned,
    scaled,
    total,
)
from qrlora.lab.baselines.merges import drawing
from samples import EPS, assert_rounded


def factored(out: int = 7, width: int = 5, rank: int = 2) -> Delta:
    return Delta(torch.randn(out, rank), torch.randn(rank, width))


def on(model: nn.Module, rank: int = 2) -> Learned:
    """A factored ΔW of every linear layer in the blocks but one, whose ΔW is dense."""
    layers = {n: m.weight for n, m in model.named_modules() if isinstance(m, nn.Linear) and "blocks" in n}
    learned = {n: Delta(0.1 * torch.randn(w.shape[0], rank), torch.randn(rank, w.shape[1])) for n, w in layers.items()}
    first = next(iter(learned))
    return learned | {first: Delta(matrix=learned[first].dense())}


@pytest.mark.parametrize("dense", [(False, False), (True, False), (False, True), (True, True)])
def test_inner_product_and_sum_are_those_of_the_matrices(dense: tuple[bool, bool]) -> None:
    a, b = (
        Delta(matrix=d.dense()) if is_dense else d for d, is_dense in zip((factored(), factored()), dense, strict=True)
    )
    size = float(a.dense().norm() * b.dense().norm())
    assert inner(a, b) == pytest.approx(float((a.dense() * b.dense()).sum()), abs=64 * EPS * size)
    assert_rounded(total([a, b.scaled(0.5)]).dense(), a.dense() + 0.5 * b.dense(), terms=16)


def test_a_sum_stays_in_factors_while_they_are_smaller() -> None:
    large = [factored(40, 30, 2) for _ in range(3)]
    assert total(large).rank == 6 and total(large).factors is not None
    assert total([factored(4, 3, 2)] * 3).factors is None


@pytest.mark.parametrize("dense", [False, True])
def test_decomposed_is_the_svd(dense: bool) -> None:
    delta = Delta(matrix=factored().dense()) if dense else factored()
    u, values, vh = delta.decomposed()
    expected = torch.linalg.svdvals(delta.dense().double())[:2]
    assert_rounded(values[:2], expected, terms=64)
    assert_rounded(u * values @ vh, delta.dense(), terms=64)
    assert Delta(torch.zeros(7, 2), torch.zeros(2, 5)).decomposed()[1].numel() == 0


@pytest.mark.parametrize(
    "parts",
    [{}, {"up": torch.ones(2, 1)}, {"up": torch.ones(2, 1), "down": torch.ones(1, 2), "matrix": torch.ones(2, 2)}],
)
def test_half_a_delta_is_refused(parts: dict[str, Tensor]) -> None:
    with pytest.raises(MismatchError, match="up and down, or matrix"):
        Delta(**parts)


def test_factors_have_to_meet() -> None:
    with pytest.raises(MismatchError, match="cannot be multiplied"):
        Delta(torch.ones(2, 1), torch.ones(2, 2))


def test_a_file_gives_back_what_was_saved(tmp_path: Path) -> None:
    learned = {"a.0": factored(), "b": Delta(matrix=torch.randn(3, 4))}
    save_learned(tmp_path / "x.safetensors", learned, {"method": "lora"})
    loaded = load_learned(tmp_path / "x.safetensors")
    assert list(loaded) == ["a.0", "b"]
    assert all(torch.equal(loaded[name].dense(), learned[name].dense()) for name in learned)
    assert [path.name for path in tmp_path.iterdir()] == ["x.safetensors"]


@pytest.mark.parametrize("content", [b"", b"nothing of the kind"])
def test_another_file_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "x.safetensors").write_bytes(content)
    with pytest.raises(AdapterFileError, match="holds no ΔW"):
        load_learned(tmp_path / "x.safetensors")


@pytest.mark.parametrize("kind", ["sd3", "flux", "unet"])
def test_applied_adds_and_takes_away_bit_for_bit(kind: str) -> None:
    model, inputs, _ = build(kind)
    learned, before = on(model), state(model)
    expected = {n: before[f"{n}.weight"] + delta.dense() for n, delta in learned.items()}
    base = predict(model, inputs)
    with pytest.raises(KeyboardInterrupt), applied(model, learned):
        assert all(torch.equal(model.get_submodule(n).weight, weight) for n, weight in expected.items())
        assert not torch.allclose(predict(model, inputs), base)
        raise KeyboardInterrupt
    assert same(model, before)


def test_applied_within_applied_adds_up() -> None:
    model, _, _ = build("sd3")
    learned, before = on(model), state(model)
    name = next(iter(learned))
    with applied(model, learned), applied(model, scaled(learned, 2.0)):
        expected = before[f"{name}.weight"] + 3 * learned[name].dense()
        assert_rounded(model.get_submodule(name).weight, expected, terms=16)
    assert same(model, before)


def test_what_is_shown_next_takes_the_place_of_what_was() -> None:
    model, _, _ = build("sd3")
    learned, before = on(model), state(model)
    names = list(learned)
    overlay = Overlay(model)
    for shown_first in (scaled(learned, 0.5), learned):
        overlay.show(shown_first)
        overlay.show({names[0]: learned[names[0]]})
        shown = model.state_dict()
        assert torch.equal(shown[f"{names[0]}.weight"], before[f"{names[0]}.weight"] + learned[names[0]].dense())
        assert all(torch.equal(shown[f"{name}.weight"], before[f"{name}.weight"]) for name in names[1:])
    overlay.lift()
    assert same(model, before)


@pytest.mark.parametrize("bad", [{"nowhere": factored()}, {"transformer_blocks.0.attn.to_q": factored()}])
def test_what_does_not_fit_is_refused_and_leaves_the_model(bad: Learned) -> None:
    model, _, _ = build("sd3")
    before = state(model)
    with pytest.raises(MismatchError), applied(model, on(model) | bad):
        pass
    with pytest.raises(MismatchError), drawing(model, on(model) | bad):
        pass
    assert same(model, before)


def test_half_precision_comes_back_too() -> None:
    model, _, _ = build("sd3")
    model.to(torch.bfloat16)
    before = state(model)
    with applied(model, on(model)):
        pass
    assert same(model, before)
