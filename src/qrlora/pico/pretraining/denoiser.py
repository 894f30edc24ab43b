"""The denoiser and both text encoders, by flow matching."""

from __future__ import annotations

import contextlib
import json
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from qrlora.pico import model, world
from qrlora.pico.pretraining import processes
from qrlora.pico.pretraining.muon import Muon
from qrlora.pico.pretraining.pictures import chunks, scenes_of
from qrlora.pico.pretraining.plan import Plan
from qrlora.pico.pretraining.run import Run, trapezoid
from qrlora.pico.pretraining.text import embed, words

Batch = Callable[[int], tuple[Tensor, list[str], np.random.Generator]]
"""step -> (latents, captions, the step's random generator)"""


def _muon_dtype(plan: Plan) -> torch.dtype:
    """The dtype of Muon's iteration. With bfloat16 units it takes 0.3 to 0.5 of its time in float32, else
    many times."""
    half = plan.muon_bf16 > 0
    if plan.muon_bf16 < 0:
        half = plan.device != "cpu" or torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return torch.bfloat16 if half else torch.float32


def optimisers(pipe: Any, plan: Plan) -> list[torch.optim.Optimizer]:
    """Muon for the matrices inside the blocks, AdamW for everything else (embeddings, norms, biases, text encoders)."""
    matrices: list[nn.Parameter] = []
    rest: list[nn.Parameter] = []
    for name, p in pipe.transformer.named_parameters():
        inside = p.ndim == 2 and name.startswith("transformer_blocks") and ".norm" not in name
        (matrices if inside else rest).append(p)
    rest += [*pipe.text_encoder.parameters(), *pipe.text_encoder_2.parameters()]
    muon = Muon(matrices, plan.muon_lr, dtype=_muon_dtype(plan))
    return [muon, torch.optim.AdamW(rest, plan.adam_lr, betas=(0.9, 0.98), weight_decay=0.01, fused=True)]


def batches(work: Path, plan: Plan) -> Batch:
    """Batches of the small world's pictures."""
    facts = json.loads((work / "latents.json").read_text())
    latents = np.concatenate([np.load(p) for p in chunks(work, plan, "latents")])
    scenes, focus = scenes_of(plan), set(filter(None, plan.focus.split(",")))
    wanted = np.array([2.0 if scene.style in focus else 1.0 for scene in scenes])
    if plan.novelties:
        kinds = [(scene.subject == "", scene.style == "") for scene in scenes[plan.pictures :]]
        counts, known = Counter(kinds), wanted[: plan.pictures].sum()
        each = plan.novel_share / (1 - plan.novel_share) * known / len(counts)  # a nameless subject, style, or both
        wanted[plan.pictures :] = [each / counts[kind] for kind in kinds]
    even = len(set(wanted)) == 1

    def batch(step: int) -> tuple[Tensor, list[str], np.random.Generator]:
        rng = np.random.default_rng((plan.seed, 2, step))
        if even:
            picks = rng.integers(len(latents), size=plan.denoiser_batch)
        else:
            picks = rng.choice(len(latents), plan.denoiser_batch, p=wanted / wanted.sum())
        wording = rng.integers(6, size=len(picks)) + 100 * rng.integers(2, size=len(picks))
        if plan.novelties:
            wording += 200 * rng.integers(1000, size=len(picks))  # by which what has no name gets another word
        captions = [world.caption(scenes[i], int(w)) for i, w in zip(picks, wording, strict=True)]
        captions = ["" if rng.random() < plan.caption_dropout else c for c in captions]
        z = torch.from_numpy(latents[picks].astype(np.float32))
        return z * facts["scaling_factor"], captions, rng

    return batch


def denoiser_stage(work: Path, plan: Plan) -> None:
    """Train the denoiser and both text encoders on the small world."""
    pipe = model.load(Path(plan.start)) if plan.start else model.build(words(work, plan), plan.seed)
    train(work, "denoiser", plan, pipe, batches(work, plan), partial(trapezoid, cool=plan.cool))


def train(work: Path, name: str, plan: Plan, pipe: Any, batch: Batch, schedule: Any, **run: Any) -> None:
    """Flow matching (Lipman et al. 2022): predict the velocity, noise - latents; see `flow_loss`."""
    parts = {n: getattr(pipe, n).to(plan.device) for n in ("transformer", "text_encoder", "text_encoder_2")}
    training = Run(work, name, parts, optimisers(pipe, plan), plan.denoiser_steps, schedule, **run)
    training.restore()
    fast = torch.compile(pipe.transformer) if plan.compile else pipe.transformer
    training.go(partial(flow_loss, pipe=pipe, fast=fast, batch=batch, plan=plan))


class _PlainAttention(TorchFunctionMode):
    """Attention as two matrix products: in bfloat16 on a CPU, torch's fused kernel takes four times as long in the
    backward pass as in float32."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is F.scaled_dot_product_attention:
            return plain_attention(*args, **(kwargs or {}))
        return function(*args, **(kwargs or {}))


def plain_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    **_: Any,
) -> Tensor:
    """Compute `scaled_dot_product_attention` without its fused kernels and without dropout."""
    weights = (query @ key.transpose(-1, -2)) * (query.shape[-1] ** -0.5 if scale is None else scale)
    if is_causal:
        later = torch.ones(weights.shape[-2:], dtype=torch.bool, device=weights.device).triu(1)
        weights = weights.masked_fill(later, -torch.inf)
    if attn_mask is not None:
        boolean = attn_mask.dtype == torch.bool
        weights = weights.masked_fill(~attn_mask, -torch.inf) if boolean else weights + attn_mask
    return weights.softmax(-1).to(value.dtype) @ value


def flow_loss(step: int, *, pipe: Any, fast: Any, batch: Batch, plan: Plan) -> Tensor:
    """Mean squared error of the velocity, noise - latents, at logit-normal times (SD3, Esser et al. 2024)."""
    z, captions, rng = batch(step)
    z = z.to(plan.device)
    noise = torch.from_numpy(rng.standard_normal(tuple(z.shape), dtype=np.float32)).to(plan.device)
    logit = plan.time_mean + plan.time_spread * rng.standard_normal(len(z), dtype=np.float32)
    t = torch.from_numpy(logit).to(plan.device).sigmoid()
    long = rng.random() < plan.long_null
    z, noise, t, captions = map(processes.own, (z, noise, t, captions))
    x = torch.lerp(z, noise, t[:, None, None, None])
    with contextlib.ExitStack() as precision:
        if plan.bf16:
            precision.enter_context(torch.autocast(torch.device(plan.device).type, dtype=torch.bfloat16))
            precision.enter_context(_PlainAttention())
        hidden, pooled = embed(pipe, captions, 256 if long else 1)
        velocity = (pipe.transformer if long else fast)(x, hidden, pooled, t * 1000).sample
    return F.mse_loss(velocity.float(), noise - z)
