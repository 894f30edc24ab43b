"""Make the figures of docs/mathematics.md from pico's weights, and print its numbers: python docs/figures.py"""

import statistics
from pathlib import Path

import matplotlib.pyplot as plt
import torch

from qrlora.lab.baselines.directions import positive_qr
from qrlora.method.basis import layer_basis
from qrlora.models.stored import stored_weights

FOLDER = Path(__file__).parent / "figures"
INK, ACCENT, SOFT = "#1d2433", "#2f6f6a", "#c9ced8"
RANK = 16
STYLE = {
    **{"font.size": 9, "axes.spines.top": False, "axes.spines.right": False, "svg.hashsalt": "qrlora"},
    **{"axes.edgecolor": INK, "text.color": INK, "axes.labelcolor": INK, "figure.constrained_layout.use": True},
}


def save(figure: plt.Figure, name: str) -> None:
    FOLDER.mkdir(exist_ok=True)
    figure.savefig(FOLDER / f"{name}.svg", metadata={"Date": None})
    plt.close(figure)


def energy(weights: dict[str, torch.Tensor]) -> None:
    """Plot the share of ‖W‖² in the first directions, a line for each matrix."""
    figure, axes = plt.subplots(figsize=(5.2, 2.8))
    for weight in weights.values():
        squares = torch.linalg.svdvals(weight).square()
        axes.plot(range(1, len(squares) + 1), squares.cumsum(0) / squares.sum(), color=ACCENT, alpha=0.35, lw=1)
    axes.axvline(RANK, color=INK, ls="--", lw=1)
    axes.set(xscale="log", xlabel="directions", ylabel="share of ‖W‖²", ylim=(0, 1.02))
    axes.text(RANK * 1.05, 0.05, f"r = {RANK}")
    save(figure, "energy")


def cosines(weight: torch.Tensor) -> None:
    """Plot the cosines of ΔW of two subjects and two styles, on shared and on disjoint columns."""
    q = layer_basis(weight, 2 * RANK).q
    random = torch.Generator().manual_seed(0)
    columns = {
        "shared columns": [range(RANK)] * 4,
        "disjoint columns": [range(0, 2 * RANK, 2)] * 2 + [range(1, 2 * RANK, 2)] * 2,
    }
    figure, both = plt.subplots(1, 2, figsize=(5.6, 2.7), sharey=True)
    names = ["subject 1", "subject 2", "style 1", "style 2"]
    for axes, (title, owned) in zip(both, columns.items(), strict=True):
        updates = [(q[:, list(c)] @ torch.randn(RANK, weight.shape[1], generator=random)).flatten() for c in owned]
        unit = torch.stack([update / update.norm() for update in updates])
        table = unit @ unit.T
        axes.imshow(table.abs() > 0.5, cmap="Greys", vmin=0, vmax=6)
        for i in range(4):
            for j in range(4):
                value = float(table[i, j])
                axes.text(j, i, "0" if abs(value) < 1e-5 else f"{value:.3f}", ha="center", va="center", fontsize=8)
        axes.set(title=title, xticks=range(4), yticks=range(4))
        axes.set_xticklabels(names, rotation=35, ha="right")
        axes.set_yticklabels(names)
        axes.tick_params(length=0)
    save(figure, "cosines")


def projection() -> None:
    """Plot the energy that the projection keeps, for three overlaps p, and the overlap that remains."""
    c = torch.linspace(0, 1, 101)
    figure, axes = plt.subplots(figsize=(5.2, 2.8))
    for p, colour in ((0.1, SOFT), (0.3, "#7fa8a4"), (0.6, ACCENT)):
        axes.plot(c, 1 - (2 * c - c**2) * p, color=colour, label=f"energy kept, p = {p:g}")
    axes.plot(c, (1 - c) ** 2, color=INK, ls=":", label="overlap left, of p")
    axes.axvline(0.5, color=INK, ls="--", lw=1)
    axes.set(xlabel="strength c", ylim=(0, 1.02))
    axes.legend(frameon=False, fontsize=8, loc="lower left")
    save(figure, "projection")


def precision(weights: dict[str, torch.Tensor]) -> None:
    """Print how far Q is from Q in float64: of W as it is, and of a bfloat16 copy of W."""
    away: dict[str, list[float]] = {"float32": [], "bfloat16": []}
    for weight in weights.values():
        u, values, vh = torch.linalg.svd(weight.double(), full_matrices=False)
        exact = positive_qr((u[:, :RANK] * values[:RANK]) @ vh[:RANK])[:, :RANK]
        for dtype, found in away.items():
            q = layer_basis(weight.to(getattr(torch, dtype)), RANK).q
            found.append(float((q.double() - exact).norm()) / RANK**0.5)
    for dtype, found in away.items():
        print(f"Q of {dtype} weights: median {statistics.median(found):.0e}, at most {max(found):.0e}")


def main() -> None:
    plt.rcParams.update(STYLE)
    stored, _ = stored_weights("pico")
    weights = {name: stored[name] for name in stored if "attn" in name}
    energy(weights)
    cosines(next(iter(weights.values())))
    projection()
    precision(weights)


if __name__ == "__main__":
    main()
