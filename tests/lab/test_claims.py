"""The measurements behind the published claims, on matrices whose answer is known."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from qrlora.lab.baselines.adapters import orthonormal, train_method
from qrlora.lab.baselines.context import Context
from qrlora.lab.claims.measures import (
    alike,
    alike_trained,
    core_before_qr,
    half_the_parameters,
    held_out_loss,
    nearest_orthonormal,
    polar_factor,
    public_sizes,
    sizes_of,
)
from qrlora.method.basis import Basis
from qrlora.models.families import load_pipeline
from qrlora.models.training.loop import train
from qrlora.models.training.recipe import Recipe
from samples import EPS, SHAPES, make_adapter, make_basis, make_lora


def test_parameters_are_counted_by_the_sides_of_the_weights() -> None:
    found = half_the_parameters({"wide": (10, 30), "tall": (30, 10)}, 4)
    assert (found["lora"], found["dense"], found["triangular"]) == (320, 160, 148)
    assert half_the_parameters({"wide": (10, 30)}, 4)["dense_ratio"] == 0.75


def test_public_models_have_the_layers_they_are_known_for() -> None:
    sizes = public_sizes()
    assert len(sizes["SDXL"]) == 560 and len(sizes["FLUX.1"]) == 19 * 12 + 38 * 3
    assert set(sizes["FLUX.1"].values()) == {(3072, 3072), (12288, 3072), (3072, 12288)}
    assert set(sizes["SD 3.5 medium"].values()) == {(1536, 1536), (6144, 1536), (1536, 6144)}
    ratios = {name: half_the_parameters(own, 64)["dense_ratio"] for name, own in sizes.items()}
    assert ratios["FLUX.1"] == ratios["SD 3.5 large"] == 0.5 and ratios["SDXL"] == pytest.approx(0.54, abs=0.005)


def test_energy_of_the_svd_core_and_of_qr() -> None:
    """Columns in rising order: the first ones of W hold next to nothing, the first singular vectors nearly all."""
    scales = torch.tensor([0.01] * 6 + [1.0] * 2)
    found = core_before_qr({"w": orthonormal(12, 8, "core") * scales}, 2)
    assert found["svd_mean"] == pytest.approx(1, abs=1e-3) and found["qr_mean"] < 1e-3 and found["svd_wins"] == 1
    falling = core_before_qr({"w": orthonormal(12, 8, "core") * scales.flip(0)}, 2)
    assert falling["qr_mean"] == pytest.approx(falling["svd_mean"], abs=64 * EPS)


@given(seed=st.integers(0, 10_000), rank=st.integers(1, 6))
@settings(max_examples=30, deadline=None)
def test_no_orthonormal_matrix_is_nearer_than_the_polar_factor(seed: int, rank: int) -> None:
    a = torch.randn(9, rank, generator=torch.Generator().manual_seed(seed)).double()
    nearest = polar_factor(a)
    assert torch.allclose(nearest.T @ nearest, torch.eye(rank).double(), atol=1e-9)
    others = [torch.linalg.qr(a).Q, orthonormal(9, rank, str(seed)).double()]
    assert all((a - nearest).norm() <= (a - other).norm() + 1e-9 for other in others)
    assert nearest_orthonormal({"w": a.float()}, rank)["columns_qr_beats"] == 0


def test_qr_is_as_near_as_the_polar_factor_where_columns_are_orthogonal_only() -> None:
    found = nearest_orthonormal({"w": torch.randn(20, 16)}, 4)
    assert found["scaled_qr"] == pytest.approx(found["scaled_polar"], abs=64 * EPS)
    assert found["columns_qr"] > found["columns_polar"] and found["core_qr"] > found["core_polar"]


def test_a_frozen_r_makes_r_alike_whatever_was_learned(tmp_path: Path) -> None:
    basis = make_basis(tmp_path)
    adapters = [make_adapter(basis, seed=seed, alpha=0.4, triangular=False) for seed in range(1, 4)]
    found = alike(adapters, basis)
    assert found["q"] == pytest.approx(1, abs=64 * EPS) and abs(found["delta_r"]) < 4 * found["delta_r_chance"]
    assert found["r"] == pytest.approx(found["r_by_start"], abs=0.02) and found["r"] > 0.9
    entries = {name: 4 * math.prod(shape[1:]) for name, shape in SHAPES.items()}
    assert found["delta_r_chance"] == pytest.approx(1 / math.sqrt(sum(entries.values())), rel=0.1)
    same = alike([adapters[0], adapters[0]], basis)
    assert (same["delta_r"], same["r"]) == pytest.approx((1, 1), abs=64 * EPS)
    assert set(alike([make_lora(seed=1), make_lora(seed=2)])) == {"a", "b", "delta_w"}


def test_trained_bases_and_losses_of_a_real_run(tiny_sd3: Path, tmp_path: Path) -> None:
    Image.radial_gradient("L").convert("RGB").save(tmp_path / "mug.png")
    recipe = Recipe(
        model=str(tiny_sd3), role="subject", images=tmp_path / "mug.png", noun="mug", rank=2, columns="first", steps=6,
        batch_size=4, learning_rate=0.01, train_basis=True,
    )  # fmt: skip
    pipe, family = load_pipeline(tiny_sd3, device="cpu")
    adapters = [train(recipe.replace(seed=seed), pipe=pipe, family=family) for seed in range(2)]
    weights = {name: pipe.transformer.get_submodule(name).weight for name in sizes_of(pipe.transformer, family)}
    basis, name = Basis.of(weights, 2), next(iter(weights))
    found = alike_trained(adapters)
    assert found["q"] > 0.9 and found["q"] >= found["q_by_start"] - 0.05 and 0 < found["q_moved"] < 0.5
    assert found["delta_q"] < 1 and alike_trained([adapters[0]] * 2)["delta_q"] == pytest.approx(1, abs=64 * EPS)
    ups = adapters[0].ups
    assert ups is not None and torch.equal(ups[name][:, :2], basis[name].q)

    context = Context(pipe, family, [recipe])
    learned = train_method("qrlora_trained", recipe, pipe=pipe, family=family).learned
    before = held_out_loss(context, 0, {}, draws=8)
    assert held_out_loss(context, 0, learned, draws=8) < before == held_out_loss(context, 0, {}, draws=8)
