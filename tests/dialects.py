"""LoRAs in the key dialects of other programs, built on a model's own layers, with the ΔW that each stands for."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from qrlora.models.exchange.names import kohya_names
from qrlora.models.exchange.originals import ORIGINALS
from qrlora.models.families import family_of

Pairs = dict[str, tuple[Tensor, Tensor]]  # layer -> (down, up)
Namer = Callable[[str], str]


@dataclass
class Lora:
    """A file's tensors and metadata, an adapter_config.json beside it if it has one, and the ΔW of its layers."""

    tensors: dict[str, Tensor]
    truth: dict[str, Tensor]
    config: dict[str, Any] = field(default_factory=dict)


def layers_of(pipe: Any, convolutions: bool = True) -> dict[str, tuple[int, ...]]:
    kinds = (nn.Linear, nn.Conv2d) if convolutions else (nn.Linear,)
    denoiser = family_of(pipe).denoiser_of(pipe)
    return {name: tuple(m.weight.shape) for name, m in denoiser.named_modules() if isinstance(m, kinds)}


def random_pairs(shapes: dict[str, tuple[int, ...]]) -> Pairs:
    """A rank of its own for each layer, from 1 to 3."""
    generator = torch.Generator().manual_seed(1)
    return {
        name: (
            torch.randn(rank := 1 + i % 3, *shape[1:], generator=generator),
            torch.randn(shape[0], rank, *[1] * (len(shape) - 2), generator=generator),
        )
        for i, (name, shape) in enumerate(shapes.items())
    }


def product(down: Tensor, up: Tensor, scaling: float = 1.0) -> Tensor:
    return scaling * up.flatten(1).double() @ down.flatten(1).double()


def by_layer(
    name: Namer, endings: tuple[str, str] = (".lora_A.weight", ".lora_B.weight"), alpha: float | None = None
) -> Callable[[Any], Lora]:
    """A dialect with a pair for each layer of diffusers, at `alpha` if there is one."""

    def build(pipe: Any) -> Lora:
        tensors, truth = {}, {}
        for layer, (down, up) in random_pairs(layers_of(pipe)).items():
            stem = name(layer)
            tensors |= {stem + endings[0]: down, stem + endings[1]: up}
            tensors |= {f"{stem}.alpha": torch.tensor(alpha)} if alpha else {}
            truth[layer] = product(down, up, alpha / len(down) if alpha else 1.0)
        return Lora(tensors, truth)

    return build


def originals(pipe: Any, xlabs: bool = False) -> Iterator[tuple[str, list[str], bool]]:
    """(name, layers, exchanged halves) of the original code's layers, as far as the model has them."""
    shapes = layers_of(pipe)
    for row in ORIGINALS[family_of(pipe).name]:
        if row.written == xlabs:
            continue
        for block in ("0", "1") if "#" in row.name else ("",):
            layers = [layer.replace("#", block) for layer in row.layers]
            if set(layers) <= set(shapes):
                halves = row.swapped and shapes[layers[0]][0] == 2 * shapes[layers[0]][1]
                yield row.name.replace("#", block), layers, halves


def by_original(
    name: Namer,
    endings: tuple[str, str] = (".lora_A.weight", ".lora_B.weight"),
    alpha: float | None = None,
    xlabs: bool = False,
) -> Callable[[Any], Lora]:
    """A dialect with the original code's layers, fused ones at one rank for all their parts."""

    def build(pipe: Any) -> Lora:
        shapes, tensors, truth = layers_of(pipe), {}, {}
        fused = {original: (layers, halves) for original, layers, halves in originals(pipe, xlabs)}
        whole = {o: (sum(shapes[n][0] for n in layers), *shapes[layers[0]][1:]) for o, (layers, _) in fused.items()}
        for original, (down, up) in random_pairs(whole).items():
            stem = name(original)
            tensors |= {stem + endings[0]: down, stem + endings[1]: up}
            tensors |= {f"{stem}.alpha": torch.tensor(alpha)} if alpha else {}
            layers, halves = fused[original]
            delta = product(down, up, alpha / len(down) if alpha else 1.0)
            if halves:
                delta = torch.cat(delta.chunk(2)[::-1])
            parts = delta.split([shapes[layer][0] for layer in layers])
            truth |= dict(zip(layers, parts, strict=True))
        return Lora(tensors, truth)

    return build


def flat(prefix: str) -> Namer:
    return lambda name: prefix + name.replace(".", "_")


def kohya(pipe: Any) -> Lora:
    """sd-scripts: SDXL and the transformers by the original code's names, SD by diffusers'."""
    family = family_of(pipe)
    if family.name in ORIGINALS:
        return by_original(flat("lora_unet_"), KOHYA, 2.0)(pipe)
    if family.name == "sd":
        return by_layer(flat("lora_unet_"), KOHYA, 2.0)(pipe)
    names = kohya_names(layers_of(pipe), [name for name, _ in pipe.unet.named_modules()], 1)
    return by_layer(names.__getitem__, KOHYA, 2.0)(pipe)


def musubi(pipe: Any) -> Lora:
    """musubi-tuner's own models: FLUX by the original names, Qwen-Image and Z-Image by diffusers'."""
    build = by_original if family_of(pipe).name.startswith("flux") else by_layer
    return build(flat("lora_unet_"), KOHYA, 2.0)(pipe)


def prefixed(pipe: Any) -> Lora:
    """ai-toolkit: FLUX.2 by the original names, Qwen-Image and Z-Image by diffusers'; the others as elsewhere."""
    name = family_of(pipe).name
    if name in ("sd", "sdxl"):
        return kohya(pipe)
    if name in ("flux", "sd3"):
        return by_layer("transformer.{}".format)(pipe)
    return (by_original if name == "flux2-klein" else by_layer)("diffusion_model.{}".format)(pipe)


def diffusers(pipe: Any) -> Lora:
    return by_layer((family_of(pipe).denoiser + ".{}").format)(pipe)


def old_diffusers(pipe: Any) -> Lora:
    def name(layer: str) -> str:
        owner, _, last = layer.removesuffix(".0").rpartition(".")
        attends = last in ("to_q", "to_k", "to_v", "to_out")
        return f"unet.{owner}.processor.{last}_lora" if attends else f"unet.{layer}.lora"

    return by_layer(name, (".down.weight", ".up.weight"))(pipe)


def peft(pipe: Any) -> Lora:
    lora = by_layer("base_model.model.{}".format)(pipe)
    ranks = {key: len(down) for key, down in lora.tensors.items() if ".lora_A." in key}
    lora.truth = {n: delta * 6 / ranks[f"base_model.model.{n}.lora_A.weight"] for n, delta in lora.truth.items()}
    lora.config = {"lora_alpha": 6}
    return lora


def locon(pipe: Any) -> Lora:
    """LyCORIS with a third matrix between the two of a convolution (its Tucker form)."""
    lora = by_layer(flat("lora_unet_"), KOHYA, 2.0)(pipe)
    generator = torch.Generator().manual_seed(2)
    for layer, shape in layers_of(pipe).items():
        if len(shape) == 4 and shape[2] == 3:
            stem = flat("lora_unet_")(layer)
            down, up = (torch.randn(size, 2, 1, 1, generator=generator) for size in (shape[1], shape[0]))
            middle = torch.randn(2, 2, 3, 3, generator=generator)
            whole = torch.einsum("or,rskl,is->oikl", up[..., 0, 0].double(), middle.double(), down[..., 0, 0].double())
            lora.truth[layer] = whole.flatten(1)  # alpha 2 at rank 2
            lora.tensors |= {f"{stem}.lora_down.weight": down.transpose(0, 1), f"{stem}.lora_up.weight": up}
            lora.tensors[f"{stem}.lora_mid.weight"] = middle
    return lora


def with_others(pipe: Any) -> Lora:
    lora = diffusers(pipe)
    lora.tensors |= {"bundle_emb.x.clip_l": torch.ones(2, 8), "lora_te1_text_model_a.alpha": torch.tensor(1.0)}
    lora.tensors |= {"text_encoder.a.lora_A.weight": torch.ones(1, 2), "text_encoder.a.lora_B.weight": torch.ones(2, 1)}
    return lora


def with_key(ending: str) -> Callable[[Any], Lora]:
    def build(pipe: Any) -> Lora:
        lora = diffusers(pipe)
        return Lora(lora.tensors | {f"{family_of(pipe).denoiser}.{next(iter(lora.truth))}{ending}": torch.ones(2)}, {})

    return build


KOHYA = (".lora_down.weight", ".lora_up.weight")
DIALECTS: dict[str, Callable[[Any], Lora]] = {
    "diffusers": diffusers,
    "diffusers, older": old_diffusers,
    "PEFT": peft,
    "kohya sd-scripts": kohya,
    "musubi-tuner": musubi,
    "ai-toolkit": prefixed,
    "original names under `diffusion_model.`": by_original("diffusion_model.{}".format),
    "diffusers names under `diffusion_model.`": by_layer("diffusion_model.{}".format),
    "OneTrainer": lambda pipe: by_layer(flat(f"lora_{family_of(pipe).denoiser}_"), KOHYA, 2.0)(pipe),
    "fal": by_original("base_model.model.{}".format),
    "XLabs": by_original(str, (".down.weight", ".up.weight"), xlabs=True),
    "lightning": by_layer(str, KOHYA, 2.0),
    "LyCORIS LoCon": locon,
    "text encoders, embeddings beside it": with_others,
    "DoRA": with_key(".lora_magnitude_vector"),
    "LoHa": with_key(".hada_w1_a"),
    "LoKr": with_key(".lokr_w1"),
    "biases": with_key(".diff_b"),
    "whole differences": with_key(".diff"),
}


def peft_config(lora: Lora) -> str:
    return json.dumps(lora.config)
