# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # For researchers
#
# The basis, ΔR, interference and crosstalk, null-space projection, and the space of adapters, each computed from
# pico's weights and four adapters that ship with `qrlora`: the subject teapot, the styles chalk, gold and mosaic, one
# picture each. After each part stands what is proven, and what is not. The statistics behind that are in
# `docs/compare.md`; here are single cases that one can change.
#
# Notation: a base weight W (d_out, d_in), rank r, scaling s = alpha / r.

# %%
from dataclasses import replace
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch

import qrlora
from qrlora import Composition, basis_of, generate, layer_basis, load_adapter, load_pipeline, pico
from qrlora.method.composition import project_out
from qrlora.method.space import Space
from qrlora.pico.judge import Judge

# %% tags=["parameters"]
PICTURES = 8  # a cell, in the part about crosstalk
DENOISING_STEPS = 20

# %%
pipe, family = load_pipeline("pico")
STARTERS = Path(qrlora.__file__).parent / "apps/studio/starters"
adapters = {}
for name in ("teapot", "chalk", "gold", "mosaic"):
    stored = load_adapter(STARTERS / f"{name}.safetensors")  # in float16, to keep the package small
    adapters[name] = replace(stored, deltas={layer: delta.float() for layer, delta in stored.deltas.items()})
teapot, chalk = adapters["teapot"], adapters["chalk"]
layers = list(teapot.deltas)
print(f"{len(layers)} adapted layers, such as {layers[0]} {teapot.shapes[layers[0]]}")

# %% [markdown]
# ## 1. The basis
#
# C = U_r S_r V_rᵀ is W's best approximation of rank r, and C = QR with Q orthonormal and R upper triangular. The core
# C is never decomposed: S_r V_rᵀ = O R, Q = U_r O.

# %%
weight = pipe.transformer.get_submodule(layers[0]).weight.detach()
rank = teapot.metadata.basis_rank
basis = layer_basis(weight, rank)
u, values, vh = torch.linalg.svd(weight)
core = (u[:, :rank] * values[:rank]) @ vh[:rank]
print(f"‖QᵀQ − I‖       {(basis.q.T @ basis.q - torch.eye(rank)).norm():.1e}")
print(f"‖QR − C‖ / ‖C‖  {(basis.q @ basis.r - core).norm() / core.norm():.1e}")
print(f"energy of W in the first {rank} directions: {basis.energy:.3f}")
assert torch.allclose(basis.q @ basis.r, core, atol=1e-4)

_, axes = plt.subplots(figsize=(5, 2.6))
for name in layers:
    squares = torch.linalg.svdvals(pipe.transformer.get_submodule(name).weight.detach()).square()
    axes.plot(range(1, len(squares) + 1), squares.cumsum(0) / squares.sum(), color="#2f6f6a", alpha=0.3, lw=1)
axes.axvline(rank, color="#1d2433", ls="--", lw=1)
_ = axes.set(
    xscale="log", xlabel="directions", ylabel="share of ‖W‖²", title=f"all adapted weights; the line is r = {rank}"
)

# %% [markdown]
# **Proven** (algebra, and the tests): the pair is unique with diag(R) > 0, so every machine computes the same Q up to
# rounding. **Not proven**: that these directions are the best to train in. Controls with minor and random directions
# are rows of `docs/compare.md`.
#
# ## 2. ΔR, and the property of columns
#
# W' = W + s·Q·ΔR. Since QᵀQ = I, ⟨ΔWᵢ, ΔWⱼ⟩ = s²⟨ΔRᵢ, ΔRⱼ⟩: inner products of the updates need no Q. Subjects own one
# half of the columns of Q, styles the other, so between the two roles they are zero by construction.

# %%
q = basis_of(pipe.transformer, teapot)[layers[0]].q
by_weights = (chalk.delta_weight(layers[0], q) * adapters["gold"].delta_weight(layers[0], q)).sum()
by_deltas = (
    chalk.scaling * adapters["gold"].scaling * (chalk.deltas[layers[0]] * adapters["gold"].deltas[layers[0]]).sum()
)
print(f"⟨ΔW, ΔW⟩ of chalk and gold in one layer: {by_weights:.5f} by ΔW, {by_deltas:.5f} by ΔR")
assert torch.allclose(by_weights, by_deltas, rtol=1e-3, atol=1e-5)

found = Composition([(adapter, 1.0) for adapter in adapters.values()]).interference()
_, both = plt.subplots(1, 2, figsize=(7, 3.2), layout="constrained")
for axes, (title, table) in zip(
    both, {"cosine of ΔW": found.total.cosine, "shared rows": found.total.shared_rows}.items(), strict=True
):
    axes.imshow(table, cmap="Greys", vmin=0, vmax=1.5)
    for i, j in np.ndindex(4, 4):
        axes.text(j, i, f"{table[i][j]:.2f}", ha="center", va="center", fontsize=8)
    axes.set(title=title, xticks=range(4), yticks=range(4), xticklabels=list(adapters), yticklabels=list(adapters))
assert all(abs(found.total.cosine[0][style]) < 1e-6 for style in (1, 2, 3))

# %% [markdown]
# **Proven**: the left table's zeros, for any ΔR on disjoint columns. **Not so**: that zeros there keep pictures apart.
# The right table says why: both read the same input directions (1 is "the same", chance is about r / d_in). And over
# many pairs, neither table predicts crosstalk.
#
# ## 3. Null-space projection
#
# ΔRᵢ ← ΔRᵢ (I − c V Vᵀ), V an orthonormal basis of the row space of the others. With p the share of ΔRᵢ's energy in
# that row space, 1 − (2c − c²)·p of its energy is kept.

# %%
strengths = torch.linspace(0, 1, 5)
parts = [(teapot, 1.0), (chalk, 1.0)]


def energy(adapter):
    """Return ‖ΔR‖² over all layers."""
    return sum(float(delta.double().square().sum()) for delta in adapter.deltas.values())


kept = {name: [] for name in ("teapot", "chalk")}
for strength in strengths.tolist():
    for name, (projected, _) in zip(kept, project_out(parts, strength), strict=True):
        kept[name].append(energy(projected) / energy(adapters[name]))
_, axes = plt.subplots(figsize=(5, 2.6))
for (name, measured), colour in zip(kept.items(), ("#1d2433", "#2f6f6a"), strict=True):
    p = 1 - measured[-1]
    expected = 1 - (2 * strengths - strengths**2) * p
    axes.plot(strengths, expected, color=colour, lw=1, label=f"{name}: 1 − (2c − c²)·{p:.2f}")
    axes.plot(strengths, measured, "o", color=colour, ms=4)
    assert np.allclose(measured, expected, atol=1e-4)
axes.set(xlabel="strength c", ylabel="energy kept", ylim=(0, 1.05))
_ = axes.legend(frameon=False, fontsize=8)

# %% [markdown]
# ## 4. Crosstalk
#
# Interference is computed from files; crosstalk is seen in pictures: an adapter's score alone less its score inside
# the composition. The score here is the probability that pico's judge, a network trained on the program that draws
# pico's world, gives to the right name among all of that world's.

# %%
judge = Judge.load()
SUBJECT, STYLE = "a photo of a teal <c> in flat style on a white background", "a photo of a teal car in <s> style"
TOGETHER = "a photo of a teal <c> in <s> style"


def scores(part, prompt, subject, style):
    """Return the probabilities of the subject and of the style, in the mean over pictures; part: (adapter, weight)."""
    options = {"adapters": [part], "steps": DENOISING_STEPS, "guidance": pico.SETTINGS["guidance"]}
    pictures = generate(pipe, family, [prompt], range(PICTURES), **options)
    among = judge.verdict(np.stack([np.asarray(picture) for picture in pictures]), subject, style).among
    return float(among["subject"].mean()), float(among["style"].mean())


STRENGTHS = (0.0, 0.5, 1.0)
_, panels = plt.subplots(1, 2, figsize=(7, 2.6), sharey=True, layout="constrained")
for axes, weights in zip(panels, ((1.0, 1.0), (1.2, 1.6)), strict=True):
    parts = list(zip((teapot, chalk), weights, strict=True))
    alone = scores(parts[0], SUBJECT, "teapot", "flat")[0], scores(parts[1], STYLE, "car", "chalk")[1]
    print(f"weights {weights}: alone teapot {alone[0]:.2f}, chalk {alone[1]:.2f}")
    for place, strength in enumerate(STRENGTHS):
        composed = Composition(parts, null_space=strength).adapter()
        inside = scores((composed, 1.0), TOGETHER, "teapot", "chalk")
        lost = [before - after for before, after in zip(alone, inside, strict=True)]
        print(f"  c = {strength:g}: teapot {inside[0]:.2f}, chalk {inside[1]:.2f}; lost {lost[0]:+.2f}, {lost[1]:+.2f}")
        axes.bar(place + np.array([0, 0.35]), lost, 0.33, color=["#1d2433", "#2f6f6a"])
    axes.axhline(0, color="#1d2433", lw=0.8)
    axes.set(title=f"weights {weights}", xticks=np.arange(3) + 0.17, xticklabels=[f"c = {c:g}" for c in STRENGTHS])
_ = panels[0].set(ylabel="crosstalk: teapot, chalk")

# %% [markdown]
# **Proven on pico** (24 pairs, 3 seeds, intervals; `qrlora lab compare`): with c = 0.5 more composed pictures are
# recognised, and there is less crosstalk, than with LoRAs that are merged directly. **Level, not ahead**: plain LoRA
# with the same projection. **Not decided here**: one pair and a few pictures are an illustration, and may show the
# opposite: here c helps at the large weights and hardly at 1, which is why the comparison chooses every method's
# weights on other pairs. **Unknown**: all of it on a large model.
#
# ## 5. A space of adapters
#
# ΔR on a frozen Q has no gauge (LoRA's (BG)(G⁻¹A) is the same update for every invertible G), so adapters of one role
# can be averaged and decomposed: a mean and principal components. Three members span a plane.

# %%
members = [adapters[name] for name in ("chalk", "gold", "mosaic")]
space = Space.of(members)
print("share of the variance:", ", ".join(f"{share:.2f}" for share in space.shares))
point = space.project(members[1])
print(f"gold in the space: mean {point.mean:.3f}, coordinates {point.coordinates}, unexplained {point.unexplained:.1e}")
assert point.unexplained < 1e-6
halfway = space.adapter(((space.coordinates[0] + space.coordinates[1]) / 2).tolist())
average = {name: (members[0].deltas[name] + members[1].deltas[name]) / 2 for name in layers}
assert all(torch.allclose(halfway.deltas[name], average[name], atol=1e-5) for name in layers)

_, axes = plt.subplots(figsize=(3.6, 3.2))
axes.scatter(*space.coordinates.T, color="#2f6f6a")
for (name, _), place in zip(space.members, space.coordinates.tolist(), strict=True):
    axes.annotate(name, place, xytext=(5, 5), textcoords="offset points", fontsize=9)
_ = axes.set(xlabel="component 1", ylabel="component 2", title="standard deviations of the members")
axes.margins(0.3)

# %% [markdown]
# **Proven**: members are reached exactly, and the point half way between two is their mean. **Not proven**: that a
# space makes new styles from few numbers. With twelve members of pico's world coefficients alone are too few, and as
# spaces alone ΔR and LoRA's factors do not differ (`docs/space.md`).
