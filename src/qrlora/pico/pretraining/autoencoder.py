"""The autoencoder: its linear form in closed form, then the decoder trained on top."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from qrlora._files import write_atomically
from qrlora.pico import model
from qrlora.pico.pretraining.muon import Muon
from qrlora.pico.pretraining.pictures import CHUNK, chunks, linear_autoencoder, tensor
from qrlora.pico.pretraining.plan import Plan
from qrlora.pico.pretraining.run import Run, saved, trapezoid


def reconstruction_loss(got: Float[Tensor, "b 3 h w"], want: Float[Tensor, "b 3 h w"]) -> Float[Tensor, ""]:
    """L1 on pixels, on their horizontal and vertical differences, on a 4x smaller copy, and on local contrast.

    Of grain that the latents do not tell, the first three would have nothing left: its mean is flat. The last asks for
    as much of it as there was, wherever its bright and dark points come to lie.
    """
    edges = (got.diff(dim=-1) - want.diff(dim=-1)).abs().mean() + (got.diff(dim=-2) - want.diff(dim=-2)).abs().mean()
    small = (F.avg_pool2d(got, 4) - F.avg_pool2d(want, 4)).abs().mean()
    grain = sum((local_contrast(got, side) - local_contrast(want, side)).abs().mean() for side in (4, 8))
    return (got - want).abs().mean() + 0.5 * edges + small + grain


def local_contrast(x: Float[Tensor, "b 3 h w"], side: int) -> Float[Tensor, "b 3 _ _"]:
    """Standard deviation within windows of ``side`` pixels that overlap by half."""
    mean, square = (F.avg_pool2d(part, side, side // 2) for part in (x, x.square()))
    return (square - mean.square()).clamp(min=1e-4).sqrt()


def autoencoder_stage(work: Path, plan: Plan) -> None:
    """The best linear autoencoder of patches, in closed form. Its encoder is final."""
    torch.manual_seed(plan.seed)
    vae = model.load(Path(plan.start)).vae if plan.start else model.autoencoder()
    if not plan.start:
        model.start_from_principal_components(vae, tensor(np.load(chunks(work, plan, "pictures")[0])))
    write_atomically(work / "autoencoder.pt", saved({"modules": {"vae": vae.state_dict()}}))


def decoder_stage(work: Path, plan: Plan) -> None:
    """Train the decoder on top of the linear one. The encoder is frozen, so latents and denoiser stay valid."""
    vae = linear_autoencoder(work, plan)
    vae.encoder.requires_grad_(False)
    pictures = [np.load(p, mmap_mode="r") for p in chunks(work, plan, "pictures")]
    trained = [p for p in vae.parameters() if p.requires_grad]
    kernels, rest = [p for p in trained if p.ndim == 4], [p for p in trained if p.ndim < 4]
    muon = Muon(kernels, plan.decoder_lr, weight_decay=0.0)
    adam = torch.optim.AdamW(rest, plan.decoder_lr, betas=(0.9, 0.98), weight_decay=0.0)
    run = Run(work, "decoder", {"vae": vae}, [muon, adam], plan.decoder_steps, trapezoid)
    run.restore()

    def loss_of(step: int) -> Tensor:
        rng = np.random.default_rng((plan.seed, 3, step))
        picks = rng.integers(len(pictures) * CHUNK, size=plan.decoder_batch)
        x = tensor(np.stack([pictures[i // CHUNK][i % CHUNK] for i in picks])).to(plan.device)
        x = x.contiguous(memory_format=torch.channels_last)
        with torch.no_grad():
            z = vae.encode(x).latent
        # a little noise: the denoiser's latents are never quite those of a picture
        z = z + 0.05 * torch.from_numpy(rng.standard_normal(tuple(z.shape), dtype=np.float32)).to(plan.device)
        return reconstruction_loss(vae.decode(z).sample, x)

    run.go(loss_of)
