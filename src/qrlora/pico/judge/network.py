"""The judge's network: one convolutional trunk, and two heads that look at different things in it."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from qrlora.pico.pretraining.muon import Muon

EMBEDDING = 48
"""Length of a factor's feature vector."""
WIDTHS = (24, 48, 96, 128)
"""Channels at 64, 32, 16 and 8 pixels a side."""


def _convolve(inside: int, outside: int, stride: int = 1) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(inside, outside, 3, stride, 1, bias=False), nn.BatchNorm2d(outside), nn.ReLU(inplace=True)
    )


class _Residual(nn.Module):
    def __init__(self, channels: int):
        super().__init__()
        self.body = _convolve(channels, channels)

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
        return x + self.body(x)


class _Head(nn.Module):
    """Statistics of the maps to a feature vector, and to one logit a name plus one for "none of these"."""

    def __init__(self, inside: int, names: int):
        super().__init__()
        self.embed = nn.Sequential(nn.BatchNorm1d(inside), nn.Linear(inside, EMBEDDING, bias=False))
        self.norm = nn.BatchNorm1d(EMBEDDING)
        self.classify = nn.Linear(EMBEDDING, names + 1)

    def forward(self, x: Float[Tensor, "b inside"]) -> tuple[Float[Tensor, "b 48"], Float[Tensor, "b names"]]:
        features = self.norm(self.embed(x))
        return features, self.classify(features)


class Network(nn.Module):
    """0.45 M parameters, 70 million multiplications a picture.

    The subject head sees where things are: the mean and the maximum of the last, coarsest maps. The style head sees how
    things are drawn: mean and spread of every channel at every resolution, position forgotten (as in Gatys et al. 2016,
    "Image style transfer using convolutional neural networks", with the diagonal of the Gram matrix only).
    """

    def __init__(self, subjects: int, styles: int):
        super().__init__()
        a, b, c, d = WIDTHS
        self.stages = nn.ModuleList([
            _convolve(12, a),
            nn.Sequential(_convolve(a, b, 2), _Residual(b)),
            nn.Sequential(_convolve(b, c, 2), _Residual(c)),
            nn.Sequential(_convolve(c, d, 2), _Residual(d)),
        ])  # fmt: skip
        self.subject = _Head(2 * d, subjects)
        self.style = _Head(2 * sum(WIDTHS), styles)

    def forward(self, pictures: Float[Tensor, "b 3 h w"]) -> dict[str, tuple[Tensor, Tensor]]:
        """Pictures in [-1, 1] to {"subject" | "style": (features (b, 48), logits (b, names + 1))}."""
        x, statistics = F.pixel_unshuffle(pictures, 2).contiguous(memory_format=torch.channels_last), []
        for stage in self.stages:
            x = stage(x)
            statistics += [x.mean((2, 3)), (x.var((2, 3)) + 1e-4).sqrt()]
        shape = torch.cat([statistics[-2], x.amax((2, 3))], 1)
        return {"subject": self.subject(shape), "style": self.style(torch.cat(statistics, 1))}


def optimisers(network: Network, muon_lr: float, adam_lr: float) -> list[torch.optim.Optimizer]:
    """Muon for the kernels and embeddings, AdamW for vectors and the classifiers."""
    named = list(network.named_parameters())
    matrices = [p for name, p in named if p.ndim > 1 and "classify" not in name]
    rest = [p for name, p in named if p.ndim == 1 or "classify" in name]
    return [Muon(matrices, muon_lr), torch.optim.AdamW(rest, adam_lr, betas=(0.9, 0.98), weight_decay=0.0)]
