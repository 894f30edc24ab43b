"""Small catalogs for tests: products and styles of random ΔR on a tiny pipeline."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import torch

from qrlora import QRLoraConfig, adapter_from_model, load_pipeline, save_adapter
from qrlora.method.adapter import remove_adapters
from qrlora.method.adapter.record import triangular_mask

RANK, TRIGGERS = 2, {"subject": "<c>", "style": "<s>"}


def adapters(model: Path, folder: Path, subjects: int, styles: int, size: float = 0.1) -> None:
    """`p0.safetensors`, … and `s0.safetensors`, … in the folder."""
    pipe, family = load_pipeline(str(model))
    denoiser = family.denoiser_of(pipe)
    for role, letter, count in (("subject", "p", subjects), ("style", "s", styles)):
        config = QRLoraConfig(r=RANK, lora_alpha=RANK, target_modules=list(family.targets), columns=role)
        denoiser.add_adapter(config, adapter_name="x")
        options = {"family": family.name, "base_model": str(model), "role": role, "trigger": TRIGGERS[role]}
        blank = adapter_from_model(denoiser, "x", **options)
        remove_adapters(denoiser, ["x"])
        for number in range(count):
            generator = torch.Generator().manual_seed(1000 * (role == "style") + number)
            deltas = {
                name: size
                * torch.randn(one.shape, generator=generator)
                * triangular_mask(blank.columns(name), one.shape[1])
                for name, one in blank.deltas.items()
            }
            save_adapter(dataclasses.replace(blank, deltas=deltas), folder / f"{letter}{number}.safetensors")


def tables(folder: Path, subjects: int, styles: int, head: str = "", style: str = "") -> list[str]:
    """products.csv and styles.toml of these adapters; the arguments that name them. style: more of every style."""
    rows = [f"product {number};p{number}.safetensors" for number in range(subjects)]
    (folder / "products.csv").write_text("\n".join(["name;adapter", *rows, ""]), "utf-8-sig")
    parts = [f'[[style]]\nname = "style {n}"\nadapter = "s{n}.safetensors"\n{style}' for n in range(styles)]
    (folder / "styles.toml").write_text("\n".join([head, "[sampling]", "steps = 1", *parts]))
    return [str(folder / "products.csv"), str(folder / "styles.toml")]
