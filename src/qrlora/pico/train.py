"""Train pico from scratch: ``python -m qrlora.pico.train --work DIR``.

Six stages, each resumable from what lies in DIR: ``render`` pictures, solve for a linear ``autoencoder``, encode
``latents``, train the ``denoiser`` (with both text encoders), train the ``decoder`` on the same latents, ``export`` the
pipeline. The same code runs on CPU and GPU.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import math
import sys
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from transformers import CLIPTokenizer

from qrlora._files import check_room, claimed, disk_error, write_atomically
from qrlora._interrupts import deferred, ended
from qrlora.errors import TrainingError
from qrlora.pico import model, world

CHUNK = 500
"""Pictures a file."""


@dataclass(frozen=True)
class Plan:
    """Everything that decides the result. Times on two cores are in the model card."""

    seed: int = 0
    pictures: int = 24_000
    decoder_steps: int = 1_500
    decoder_batch: int = 8
    decoder_lr: float = 1e-3
    denoiser_steps: int = 4_500
    denoiser_batch: int = 48
    muon_lr: float = 0.02
    muon_bf16: int = 0  # 1: Muon's iteration in bfloat16, for processors that have units for it
    adam_lr: float = 1.5e-3
    time_mean: float = 0.4  # of the logit of the noise's share. A whole picture's colours are decided above 0.95, where
    time_spread: float = 1.4  # the usual logit-normal (0, 1) looks in one sample of 600 and this one in 28
    cool: float = 0.3  # the last share of the denoiser's steps, in which the learning rates fall to zero
    novelties: int = 0  # pictures more, with shapes and styles that have no name (`world.novel`)
    novel_share: float = 0.3  # of the denoiser's examples, if there are any; as often of every kind
    focus: str = ""  # styles to draw twice as often as the others, separated by commas
    caption_dropout: float = 0.1
    long_null: float = 0.03  # share of steps with the 256 zero tokens that the stock pipeline sends by default
    threads: int = 0
    compile: int = 0  # 1: torch.compile the denoiser (two minutes to start, a quarter less time a step)
    device: str = "cpu"
    start: str = ""  # a saved pipeline to train further, instead of starting from nothing


# ---------------------------------------------------------------- pictures


NOVEL_SCENES = 5_000_000
"""Scene seed of the first picture with something nameless in it."""


def scenes_of(plan: Plan) -> list[world.Scene]:
    """The scenes of all pictures: of the world, then those with something nameless in them."""
    known = [world.sample_scene(i) for i in range(plan.pictures)]
    return known + [world.sample_novelty(NOVEL_SCENES + i) for i in range(plan.novelties)]


def _render_chunk(path: Path, scenes: list[world.Scene]) -> None:
    torch.set_num_threads(1)
    pictures = np.stack([world.render(scene)[0] for scene in scenes])
    write_atomically(path, lambda f: np.save(f, pictures))


def _chunks(work: Path, plan: Plan, kind: str) -> list[Path]:
    """Files of known pictures, then of novel ones; the first stay valid when the second are added."""
    known = [work / f"{kind}-{i:04d}.npy" for i in range(plan.pictures // CHUNK)]
    return known + [work / f"novel-{kind}-{i:04d}.npy" for i in range(plan.novelties // CHUNK)]


def render_stage(work: Path, plan: Plan, workers: int = 2) -> None:
    """Render picture i from scene seed i, in files of ``CHUNK`` pictures; those with something nameless after them."""
    scenes = scenes_of(plan)
    files = [(p, scenes[i * CHUNK : (i + 1) * CHUNK]) for i, p in enumerate(_chunks(work, plan, "pictures"))]
    todo = [(path, part) for path, part in files if not path.exists()]
    check_room(work, len(todo) * CHUNK * world.SIZE**2 * 3, folder=True)
    with ProcessPoolExecutor(workers) as pool:
        for done, _ in enumerate(pool.map(_render_chunk, *zip(*todo, strict=True)) if todo else []):
            log(work, "render", step=done + 1, of=len(todo))


def log(work: Path, stage: str, **facts: object) -> None:
    """One line of JSON in the log file, and on the terminal."""
    line = json.dumps({"stage": stage, "time": round(time.time()), **facts})
    print(line, flush=True)
    path = work / "log.jsonl"
    try:
        with open(path, "a") as file:
            file.write(line + "\n")
    except OSError as error:
        raise disk_error(error, path) from error


def _saved(state: dict[str, Any]) -> bytes:
    """What torch.save writes; to a file on a full disk it would write with errors of its own."""
    stream = io.BytesIO()
    torch.save(state, stream)
    return stream.getvalue()


def _tensor(pictures: np.ndarray) -> Float[Tensor, "b 3 h w"]:
    """uint8 pictures as float32 in [-1, 1]."""
    return torch.from_numpy(pictures).permute(0, 3, 1, 2).float() / 127.5 - 1


# ---------------------------------------------------------------- resumable loop


class Muon(torch.optim.Optimizer):
    """Momentum made orthogonal by Newton-Schulz iterations (K. Jordan 2024), batched over equal shapes.

    ``torch.optim.Muon`` iterates in bfloat16, which processors without bfloat16 units emulate at eight times the cost
    of the whole backward pass; here the dtype is chosen. Convolution kernels are treated as (out, in * h * w).
    """

    def __init__(
        self,
        params: list[nn.Parameter],
        lr: float,
        momentum: float = 0.95,
        weight_decay: float = 0.01,
        dtype: torch.dtype = torch.float32,
    ):
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})
        self.dtype = dtype

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """One update of every parameter."""
        for group in self.param_groups:
            shapes: dict[tuple[int, ...], list[nn.Parameter]] = {}
            for p in group["params"]:
                shapes.setdefault((p.shape[0], p[0].numel()), []).append(p)
            for (rows, columns), params in shapes.items():
                momenta = torch.stack([self._momentum(p, group["momentum"]) for p in params])
                update = orthogonalise(momenta.to(self.dtype)).to(momenta.dtype)
                for p, u in zip(params, update, strict=True):
                    p.mul_(1 - group["lr"] * group["weight_decay"])
                    p.add_(u.reshape(p.shape), alpha=-group["lr"] * max(1.0, rows / columns) ** 0.5)

    def _momentum(self, p: nn.Parameter, beta: float) -> Tensor:
        state = self.state[p]
        assert p.grad is not None, "every parameter of a block takes part in every step"
        if not state:
            state["momentum"] = torch.zeros_like(p, memory_format=torch.contiguous_format)
        state["momentum"].lerp_(p.grad, 1 - beta)
        return torch.lerp(p.grad, state["momentum"], beta).flatten(1)  # Nesterov


def orthogonalise(m: Float[Tensor, "b rows columns"], steps: int = 5) -> Float[Tensor, "b rows columns"]:
    """The nearest matrix with singular values near 1, by the quintic Newton-Schulz iteration of Muon."""
    tall = m.shape[-2] > m.shape[-1]
    x = m.mT if tall else m
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(steps):
        a = x @ x.mT
        x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
    return x.mT if tall else x


@dataclass
class Run:
    """A training run that can stop at any step and go on as if it had not."""

    work: Path
    name: str
    modules: dict[str, nn.Module]
    optimisers: list[torch.optim.Optimizer]
    steps: int
    schedule: Callable[[float], float]  # progress in [0, 1] to a factor on every learning rate
    step: int = 0

    @property
    def file(self) -> Path:
        return self.work / f"{self.name}.pt"

    def restore(self) -> None:
        """Load the last checkpoint, if there is one."""
        for optimiser in self.optimisers:
            for group in optimiser.param_groups:
                group.setdefault("base_lr", group["lr"])
        if self.file.exists():
            state = torch.load(self.file, weights_only=True)
            self.step = state["step"]
            if self.step > self.steps:
                raise TrainingError(
                    f"{self.file} has more steps behind it than are asked for",
                    expected=f"{self.step} or more",
                    got=self.steps,
                    remedy="ask for more steps, or name another --work",
                )
            for name, module in self.modules.items():
                module.load_state_dict(state["modules"][name])
            for optimiser, saved in zip(self.optimisers, state["optimisers"], strict=True):
                optimiser.load_state_dict(saved)

    def save(self) -> None:
        """Write a checkpoint whole."""
        modules = {n: m.state_dict() for n, m in self.modules.items()}
        state = {"step": self.step, "modules": modules, "optimisers": [o.state_dict() for o in self.optimisers]}
        write_atomically(self.file, _saved(state))

    def go(self, loss_of: Callable[[int], Tensor], every: int = 100) -> None:
        """Run to the last step. ``loss_of(step)`` draws all its randomness from the step's own seed."""
        started, losses = time.time(), list[float]()
        with deferred() as interrupted:
            while self.step < self.steps:
                losses.append(self._one(loss_of))
                if self.step % every == 0 or self.step == self.steps:
                    self.save()
                    seconds, mean = (time.time() - started) / len(losses), sum(losses) / len(losses)
                    facts = {"step": self.step, "loss": round(mean, 5), "seconds_per_step": round(seconds, 3)}
                    log(self.work, self.name, **facts)
                    started, losses = time.time(), []
                if interrupted():
                    self.save()
                    raise KeyboardInterrupt(f"interrupted after step {self.step}; the same command goes on from there")

    def _one(self, loss_of: Callable[[int], Tensor]) -> float:
        """One step; returns its loss."""
        factor = self.schedule(self.step / self.steps)
        for optimiser in self.optimisers:
            for group in optimiser.param_groups:
                group["lr"] = group["base_lr"] * factor
            optimiser.zero_grad(set_to_none=True)
        loss = loss_of(self.step)
        loss.backward()
        if not math.isfinite(loss.item()):
            raise FloatingPointError(f"{self.name}: loss is {loss.item()} at step {self.step}")
        for module in self.modules.values():
            nn.utils.clip_grad_norm_(module.parameters(), 1.0)
        for optimiser in self.optimisers:
            optimiser.step()
        self.step += 1
        return loss.item()


def trapezoid(progress: float, warm: float = 0.02, cool: float = 0.3) -> float:
    """Warm up, hold, then fall linearly to zero: the last stretch is where a short run gains most."""
    return min(1.0, (progress + 1e-3) / warm, max(0.0, (1 - progress) / cool))


# ---------------------------------------------------------------- autoencoder


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
        model.start_from_principal_components(vae, _tensor(np.load(_chunks(work, plan, "pictures")[0])))
    write_atomically(work / "autoencoder.pt", _saved({"modules": {"vae": vae.state_dict()}}))


def decoder_stage(work: Path, plan: Plan) -> None:
    """Train the decoder on top of the linear one. The encoder is frozen, so latents and denoiser stay valid."""
    vae = model.autoencoder()
    vae.load_state_dict(torch.load(work / "autoencoder.pt", weights_only=True)["modules"]["vae"])
    vae.encoder.requires_grad_(False)
    vae = vae.to(plan.device, memory_format=torch.channels_last)
    pictures = [np.load(p, mmap_mode="r") for p in _chunks(work, plan, "pictures")]
    trained = [p for p in vae.parameters() if p.requires_grad]
    kernels, rest = [p for p in trained if p.ndim == 4], [p for p in trained if p.ndim < 4]
    muon = Muon(kernels, plan.decoder_lr, weight_decay=0.0)
    adam = torch.optim.AdamW(rest, plan.decoder_lr, betas=(0.9, 0.98), weight_decay=0.0)
    run = Run(work, "decoder", {"vae": vae}, [muon, adam], plan.decoder_steps, trapezoid)
    run.restore()

    def loss_of(step: int) -> Tensor:
        rng = np.random.default_rng((plan.seed, 3, step))
        picks = rng.integers(len(pictures) * CHUNK, size=plan.decoder_batch)
        x = _tensor(np.stack([pictures[i // CHUNK][i % CHUNK] for i in picks])).to(plan.device)
        x = x.contiguous(memory_format=torch.channels_last)
        with torch.no_grad():
            z = vae.encode(x).latent
        # a little noise: the denoiser's latents are never quite those of a picture
        z = z + 0.05 * torch.from_numpy(rng.standard_normal(tuple(z.shape), dtype=np.float32)).to(plan.device)
        return reconstruction_loss(vae.decode(z).sample, x)

    run.go(loss_of)


# ---------------------------------------------------------------- latents


def _trained(work: Path, name: str, pipe: Any) -> None:
    state = torch.load(work / f"{name}.pt", weights_only=True)
    for part, weights in state["modules"].items():
        getattr(pipe, part).load_state_dict(weights)


@torch.no_grad()
def latents_stage(work: Path, plan: Plan) -> None:
    """Encode every picture once; the scale to unit variance goes into the autoencoder's config."""
    vae = model.autoencoder()
    vae.load_state_dict(torch.load(work / "autoencoder.pt", weights_only=True)["modules"]["vae"])
    vae = vae.to(plan.device, memory_format=torch.channels_last).eval()
    for source, target in zip(_chunks(work, plan, "pictures"), _chunks(work, plan, "latents"), strict=True):
        if not target.exists():
            parts = _tensor(np.load(source)).split(50)
            z = torch.cat([vae.encode(x.to(plan.device)).latent.cpu() for x in parts]).half().numpy()
            write_atomically(target, partial(np.save, arr=z))
    sample = np.load(_chunks(work, plan, "latents")[0]).astype(np.float32)
    facts = {"scaling_factor": float(1 / sample.std())}
    write_atomically(work / "latents.json", json.dumps(facts).encode())
    log(work, "latents", **facts)


# ---------------------------------------------------------------- denoiser


def all_captions() -> list[str]:
    """Every wording about seen subjects and styles: what the tokenizer's merges are learned from."""
    scenes = [world.sample_scene(i, subject=s, style=t) for i, (s, t) in enumerate(world.SEEN_PAIRS * 8)]
    return [world.caption(scene, i % 6 + 100 * (i % 2)) for i, scene in enumerate(scenes)]


def words(work: Path, plan: Plan) -> CLIPTokenizer:
    """The tokenizer of this run: that of the pipeline it starts from, or one fitted once and kept in ``work``.

    A tokenizer fitted again may number its words otherwise, since merges that are as frequent as one another come in
    any order.
    """
    folder = (Path(plan.start) if plan.start else work) / "tokenizer"
    if not folder.exists():
        model.tokenizer(all_captions()).save_pretrained(folder)
    return model.saved_tokenizer(folder)


def optimisers(pipe: Any, plan: Plan) -> list[torch.optim.Optimizer]:
    """Muon for the matrices inside the blocks, AdamW for everything else (embeddings, norms, biases, text encoders)."""
    matrices: list[nn.Parameter] = []
    rest: list[nn.Parameter] = []
    for name, p in pipe.transformer.named_parameters():
        inside = p.ndim == 2 and name.startswith("transformer_blocks") and ".norm" not in name
        (matrices if inside else rest).append(p)
    rest += [*pipe.text_encoder.parameters(), *pipe.text_encoder_2.parameters()]
    muon = Muon(matrices, plan.muon_lr, dtype=torch.bfloat16 if plan.muon_bf16 else torch.float32)
    return [muon, torch.optim.AdamW(rest, plan.adam_lr, betas=(0.9, 0.98), weight_decay=0.01, fused=True)]


def embed(pipe: Any, captions: list[str], null_tokens: int) -> tuple[Tensor, Tensor]:
    """What ``encode_prompt`` computes, with gradients: (b, 24 + null_tokens, 256) and (b, 256)."""
    ids = pipe.tokenizer(
        captions, padding="max_length", max_length=model.TOKENS, truncation=True, return_tensors="pt"
    ).input_ids.to(pipe.transformer.device)
    outs = [e(ids, output_hidden_states=True) for e in (pipe.text_encoder, pipe.text_encoder_2)]
    hidden = torch.cat([o.hidden_states[-2] for o in outs], -1)
    hidden = torch.cat([hidden, hidden.new_zeros(len(captions), null_tokens, hidden.shape[-1])], 1)
    return hidden, torch.cat([o.text_embeds for o in outs], -1)


def batches(work: Path, plan: Plan) -> Callable[[int], tuple[Tensor, list[str], np.random.Generator]]:
    """step -> (latents, captions, the step's random generator)."""
    facts = json.loads((work / "latents.json").read_text())
    latents = np.concatenate([np.load(p) for p in _chunks(work, plan, "latents")])
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
    """Flow matching (Lipman et al. 2022; SD3, Esser et al. 2024): predict noise - latents at logit-normal times."""
    pipe = model.load(Path(plan.start)) if plan.start else model.build(words(work, plan), plan.seed)
    parts = {n: getattr(pipe, n).to(plan.device) for n in ("transformer", "text_encoder", "text_encoder_2")}
    run = Run(work, "denoiser", parts, optimisers(pipe, plan), plan.denoiser_steps, partial(trapezoid, cool=plan.cool))
    run.restore()
    batch = batches(work, plan)
    fast = torch.compile(pipe.transformer) if plan.compile else pipe.transformer

    def loss_of(step: int) -> Tensor:
        z, captions, rng = batch(step)
        z = z.to(plan.device)
        noise = torch.from_numpy(rng.standard_normal(tuple(z.shape), dtype=np.float32)).to(plan.device)
        logit = plan.time_mean + plan.time_spread * rng.standard_normal(len(z), dtype=np.float32)
        t = torch.from_numpy(logit).to(plan.device).sigmoid()
        long = rng.random() < plan.long_null
        hidden, pooled = embed(pipe, captions, 256 if long else 1)
        x = torch.lerp(z, noise, t[:, None, None, None])
        velocity = (pipe.transformer if long else fast)(x, hidden, pooled, t * 1000).sample
        return F.mse_loss(velocity, noise - z)

    run.go(loss_of)


# ---------------------------------------------------------------- export


def export_stage(work: Path, plan: Plan, target: Path) -> None:
    """Put the trained parts together and write the pipeline directory. Without a denoiser trained here, all but the
    decoder is the start's."""
    alone = bool(plan.start) and not (work / "denoiser.pt").exists()
    pipe = model.load(Path(plan.start)) if alone else model.build(words(work, plan), plan.seed)
    for name in ("decoder",) if alone else ("autoencoder", "decoder", "denoiser"):
        if name != "decoder" or (work / "decoder.pt").exists():
            _trained(work, name, pipe)
    if not alone:
        pipe.vae.register_to_config(**json.loads((work / "latents.json").read_text()))
        novel = [world.caption(scene, i) for i, scene in enumerate(scenes_of(plan)[plan.pictures :])]
        model.tell_words_apart(pipe, all_captions() + novel)
    model.save(pipe, target)
    log(work, "export", path=target.name, plan=asdict(plan))


STAGES = ("render", "autoencoder", "latents", "denoiser", "decoder", "export")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m qrlora.pico.train", description=__doc__.split("\n\n")[0])
    parser.add_argument(
        "--work", type=Path, required=True, help="folder for pictures, latents, checkpoints and the log"
    )
    parser.add_argument("--stages", default=",".join(STAGES), help="comma-separated; default: all, in order")
    parser.add_argument("--target", type=Path, default=Path(__file__).parent / "weights" / "pipeline")
    for name, value in asdict(Plan()).items():
        parser.add_argument("--" + name.replace("_", "-"), type=type(value), default=value)
    return parser.parse_args()


def main() -> int:
    """Run the stages named on the command line."""
    args = _arguments()
    plan = Plan(**{name: getattr(args, name) for name in asdict(Plan())})
    if plan.threads:
        torch.set_num_threads(plan.threads)
    stages = args.stages.split(",")
    with contextlib.ExitStack() as claims:
        for folder in (args.work, args.target) if "export" in stages else (args.work,):
            claims.enter_context(claimed(folder, folder=True))
        for stage in stages:
            if stage == "export":
                export_stage(args.work, plan, args.target)
            else:
                globals()[f"{stage}_stage"](args.work, plan)
    return 0


if __name__ == "__main__":
    sys.exit(ended("qrlora.pico.train", main))
