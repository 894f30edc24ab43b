"""The published method (arXiv 2507.04599) written out from its equations, trained beside ours on one denoiser.

Same base weights, pictures, noise, timesteps and optimiser settings. The published layer replaces W by
W_res + s Q (R + ΔR), with LAPACK's signs in Q and R and the triangle applied at every step; its second mode trains Q
and R themselves. What it learns is the same ΔW as ours, and its checkpoints, in the key layout of the published code,
come in through `qrlora import` and paint what its denoiser paints.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
from PIL import Image
from torch import Tensor, nn

from qrlora.apps.cli import main
from qrlora.method.adapter import Adapter, load_adapter
from qrlora.method.adapter.attach import base_weights
from qrlora.method.basis import Basis
from qrlora.models.families import ModelFamily, family_of, load_pipeline
from qrlora.models.generation import generate
from qrlora.models.training.loop import train
from qrlora.models.training.recipe import Recipe
from samples import EPS
from tiny_pipelines import build_tiny_flux

RANK = 4
PUBLISHED_LAYERS = (
    *("attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0"),
    *("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj", "attn.to_add_out"),
    *("ff.net.0.proj", "ff.net.2", "ff_context.net.0.proj", "ff_context.net.2"),
)
"""A layer is adapted if its name contains one of these."""

Draw = tuple[Tensor, Tensor, Tensor, dict[str, Tensor]]  # latents, noise, timesteps, conditions of one forward pass


class PublishedLinear(nn.Module):
    """y = W_res x + s Q (R + ΔR) x; sections 3.2 and 3.3 of the paper. `both`: Q and R train, and there is no ΔR."""

    def __init__(self, base: nn.Linear, alpha: float, both: bool):
        super().__init__()
        self.residual, self.scaling = base, alpha / RANK
        u, values, vh = torch.linalg.svd(base.weight.detach())
        core = u[:, :RANK] @ torch.diag(values[:RANK] / self.scaling) @ vh[:RANK]
        q, r = torch.linalg.qr(core)
        self.q = nn.Parameter(q[:, :RANK].clone(), requires_grad=both)
        self.r = nn.Parameter(r[:RANK].clone(), requires_grad=both)
        self.delta_r = nn.Parameter(torch.zeros_like(r[:RANK]), requires_grad=not both)
        self.mask = torch.triu(torch.ones_like(r[:RANK]))
        base.weight.data = base.weight.data - self.scaling * core

    def forward(self, x: Tensor) -> Tensor:
        self.delta_r.data *= self.mask
        return self.residual(x) + self.scaling * (x @ (self.r + self.delta_r * self.mask).T @ self.q.T)

    @property
    def whole_weight(self) -> Tensor:
        return (self.residual.weight + self.scaling * self.q @ (self.r + self.delta_r)).detach()


@dataclasses.dataclass
class Trained:
    """Both after the same steps: ours as an adapter, theirs in their denoiser, and the ΔW of each."""

    recipe: Recipe
    ours: Adapter
    theirs: Any
    layers: dict[str, PublishedLinear]
    our_deltas: dict[str, Tensor]
    their_deltas: dict[str, Tensor]


def train_both(folder: Path, both: bool = False, **fields: Any) -> Trained:
    Image.radial_gradient("L").convert("RGB").save(folder / "mug.png")
    build_tiny_flux().save_pretrained(folder / "flux")
    recipe = Recipe(
        model=str(folder / "flux"),
        role="subject",
        images=folder / "mug.png",
        noun="mug",
        rank=RANK,
        columns="first",
        triangular=not both,
        train_basis=both,
        steps=12,
        batch_size=1,
        accumulation=4,
        resolution=16,
        **{"learning_rate": 1e-2, "weight_decay": 0.0 if both else 1e-4, **fields},
    )
    draws: list[Draw] = []
    pipe, family = load_pipeline(recipe.model, device="cpu")

    class Listening(ModelFamily):
        def loss(self, denoiser: nn.Module, scheduler: Any, *inputs: Any, **options: Any) -> Tensor:
            *draw, mask = inputs
            assert mask is None and not options
            draws.append(tuple(draw))  # type: ignore[arg-type]
            return super().loss(denoiser, scheduler, *inputs, **options)

    ours = train(recipe, pipe=pipe, family=Listening(**vars(family)))
    assert len(draws) == recipe.steps * recipe.accumulation
    weights = base_weights(pipe.transformer, ours.deltas)
    basis = Basis.of(weights, RANK) if ours.metadata.on_basis else {}
    theirs, _ = load_pipeline(recipe.model, device="cpu")
    layers = put_published_layers(theirs.transformer, recipe.alpha, both)
    train_published(theirs.transformer, layers, draws, recipe)
    return Trained(
        recipe,
        ours,
        theirs,
        layers,
        {name: ours.delta_weight(name, basis[name].q if basis else None) for name in ours.deltas},
        {name: layer.whole_weight - weights[name] for name, layer in layers.items()},
    )


def put_published_layers(transformer: nn.Module, alpha: float, both: bool) -> dict[str, PublishedLinear]:
    transformer.requires_grad_(False)
    found = {n: m for n, m in transformer.named_modules() if any(key in n for key in PUBLISHED_LAYERS)}
    layers = {n: PublishedLinear(m, alpha, both) for n, m in found.items() if isinstance(m, nn.Linear)}
    for name, layer in layers.items():
        parent, _, child = name.rpartition(".")
        setattr(transformer.get_submodule(parent), child, layer)
    return layers


def train_published(transformer: Any, layers: Any, draws: list[Draw], recipe: Recipe) -> None:
    """AdamW at its defaults, a constant rate, gradients of all layers clipped together to norm 1."""
    parameters = [p for layer in layers.values() for p in layer.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=recipe.learning_rate, weight_decay=recipe.weight_decay)
    for step in range(recipe.steps):
        for draw in draws[step * recipe.accumulation : (step + 1) * recipe.accumulation]:
            (flow_matching(transformer, *draw) / recipe.accumulation).backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()


def flow_matching(
    transformer: Any, latents: Tensor, noise: Tensor, timesteps: Tensor, conditions: dict[str, Tensor]
) -> Tensor:
    """|v - (noise - latents)|² on packed latents at guidance 1, as `train_dreambooth_lora_flux.py`."""
    sigmas = (timesteps / 1000).view(-1, 1, 1, 1)
    noisy = (1.0 - sigmas) * latents + sigmas * noise
    side = latents.shape[-1] // 2
    rows, columns = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    tokens = transformer(
        hidden_states=nn.functional.pixel_unshuffle(noisy, 2).flatten(2).transpose(1, 2),
        timestep=timesteps / 1000,
        guidance=torch.ones(len(latents)),
        img_ids=torch.stack([torch.zeros(side**2), rows.flatten(), columns.flatten()], -1),
        txt_ids=torch.zeros(conditions["encoder_hidden_states"].shape[1], 3),
        return_dict=False,
        **conditions,
    )[0]
    velocity = nn.functional.pixel_shuffle(tokens.transpose(1, 2).unflatten(2, (side, side)), 2)
    return torch.mean((velocity - (noise - latents)) ** 2)


def assert_same(ours: dict[str, Tensor], theirs: dict[str, Tensor], tolerance: float = 1e-4) -> None:
    assert set(ours) == set(theirs)
    for name, delta in theirs.items():
        assert delta.norm() > 0
        assert float((ours[name] - delta).norm() / delta.norm()) < tolerance, name


def picture(pipe: Any, **options: Any) -> np.ndarray:
    [image] = generate(
        pipe, family_of(pipe), ["a photo of a <c> mug"], [3], steps=3, guidance=2.0, resolution=64, **options
    )
    return np.asarray(image, np.int16)


def imported(folder: Path, tensors: dict[str, Tensor], *options: str) -> Adapter:
    """The checkpoint through the command line."""
    safetensors.torch.save_file({k: v.detach().contiguous() for k, v in tensors.items()}, folder / "theirs.safetensors")
    command = ["import", str(folder / "theirs.safetensors"), "-o", str(folder / "imported.safetensors")]
    assert main([*command, "--model", str(folder / "flux"), *options]) == 0
    return load_adapter(folder / "imported.safetensors")


def test_delta_r_alone_learns_the_same_and_its_checkpoint_comes_in(tmp_path: Path) -> None:
    """The published default: ΔR upper triangular, alpha = rank."""
    run = train_both(tmp_path)
    assert_same(run.our_deltas, run.their_deltas)
    checkpoint = {}
    for name, layer in run.layers.items():
        parts = {"q": layer.q, "base_r": layer.r, "delta_r": layer.delta_r}
        checkpoint |= {f"transformer.{name}.lora.{part}.weight": tensor for part, tensor in parts.items()}
    adapter = imported(tmp_path, checkpoint)
    assert adapter.metadata.on_basis and adapter.metadata.triangular
    assert adapter.metadata.algorithm == "exact" and adapter.digests == run.ours.digests
    assert_same(dict(adapter.deltas), dict(run.ours.deltas))
    paints_their_picture(run, adapter)


def test_q_and_r_trained_learn_the_same_and_their_checkpoint_comes_in(tmp_path: Path) -> None:
    """The published "fast convergence" mode, where R is dense. AdamW's decay pulls Q and R themselves towards zero
    there, and here what was learned; so there is none."""
    run = train_both(tmp_path, both=True)
    assert_same(run.our_deltas, run.their_deltas)
    checkpoint = {}
    for name, layer in run.layers.items():
        key = f"transformer.{name}" + (".to_out.0" if name.endswith("to_out.0") else "")  # as that code spells it
        checkpoint |= {f"{key}.lora.up.weight": layer.q, f"{key}.lora.down.weight": layer.r}
    adapter = imported(tmp_path, checkpoint)
    assert adapter.metadata.method == "qrlora_train_basis" and adapter.metadata.rank == 2 * RANK
    assert_same({name: adapter.delta_weight(name, None) for name in adapter.deltas}, run.their_deltas)
    paints_their_picture(run, adapter)


def paints_their_picture(run: Trained, adapter: Adapter) -> None:
    theirs = picture(run.theirs)
    pipe, _ = load_pipeline(run.recipe.model, device="cpu")
    assert np.abs(picture(pipe) - theirs).max() > 10, "so little was learned that nothing is shown"
    assert np.abs(picture(pipe, adapters=[(adapter, 1.0)]) - theirs).max() <= 1


def test_a_whole_checkpoint_is_read_with_its_base_model_only(tmp_path: Path, capsys: Any) -> None:
    build_tiny_flux().save_pretrained(tmp_path / "flux")
    transformer = load_pipeline(tmp_path / "flux", device="cpu")[0].transformer
    layers = put_published_layers(transformer, RANK, both=True)
    whole = {}
    for name, layer in layers.items():
        whole |= {f"transformer.{name}.lora.up.weight": layer.q, f"transformer.{name}.lora.down.weight": layer.r}
    adapter = imported(tmp_path, whole)
    for name, layer in layers.items():  # untrained: no difference, not the core
        assert adapter.delta_weight(name, None).norm() < 128 * EPS * layer.residual.weight.norm()
    command = ["import", str(tmp_path / "theirs.safetensors"), "-o", str(tmp_path / "b.safetensors")]
    assert main(command) == 2 and "no difference to the base weight" in capsys.readouterr().err
    first = next(key for key in whole if key.endswith("down.weight"))
    for change, said in ((-whole[first], "another base weight"), (whole[first][:, 1:], "not this model's")):
        safetensors.torch.save_file(
            {key: tensor.detach().contiguous() for key, tensor in (whole | {first: change}).items()},
            tmp_path / "theirs.safetensors",
        )
        assert main([*command, "--model", str(tmp_path / "flux")]) == 2
        assert said in capsys.readouterr().err and not (tmp_path / "b.safetensors").exists()
