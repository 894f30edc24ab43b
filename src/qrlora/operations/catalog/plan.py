"""List the pictures of a catalog, products times styles times prompts times seeds, each with a digest of its inputs."""

from __future__ import annotations

import functools
import glob
import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from qrlora.models.training.recipe import Recipe
from qrlora.operations.catalog.tables import PRODUCT, STYLE, Item, Style
from qrlora.operations.provenance.canonical import canonical_json, digest_of, file_digest, known_digest
from qrlora.quality.brand import BrandSheet

FORMAT = 1
"""Raised when the same inputs would give other pictures, so that they are made anew."""


def base_digest(model: str) -> str:
    """Return the digest of a base model: of the names and bytes of all its files."""
    from qrlora.models.stored import model_files

    return digest_of(canonical_json({name: file_digest(path) for name, path in model_files(model).items()}))


@dataclass(frozen=True)
class Settings:
    """Settings that all pictures of a catalog share.

    Attributes:
        folder: of the catalog; on a cluster one that all machines share.
        metrics: names; None computes those whose references are there.
        threads: processor cores of a worker; None leaves torch's own.
        c2pa: name of the certificate that each picture is marked by; None marks none.
    """

    model: str
    dtype: str
    folder: Path
    steps: int | None = None
    guidance: float | None = None
    resolution: int | None = None
    sheet: BrandSheet | None = None
    metrics: tuple[str, ...] | None = None
    threads: int | None = None
    c2pa: str | None = None

    @functools.cached_property
    def base(self) -> str:
        """Digest of the base model, hashed once in a run."""
        return base_digest(self.model)

    @property
    def sampling(self) -> dict[str, Any]:
        """Steps, guidance and resolution, as `generate` takes them."""
        return {"steps": self.steps, "guidance": self.guidance, "resolution": self.resolution}


@dataclass(frozen=True)
class Picture:
    """One picture to make.

    Attributes:
        key: digest of all that decides its pixels, and of whose mark its file bears.
        parts: adapter files with weights: the product's, the style's.
        file: its path, relative to the catalog's folder.
        references: pictures it is compared with, by role.
        scored_by: digest of all that decides its scores, but for its pixels.
        composition: digest of the registered composition of its parts; empty without a registry.
    """

    key: str
    product: str
    style: str
    prompt: str
    seed: int
    parts: tuple[tuple[str, float], ...]
    null_space: float
    file: str
    references: Mapping[str, str] = field(default_factory=dict)
    scored_by: str = ""
    composition: str = ""


@dataclass(frozen=True)
class Training:
    """An adapter to train: its name (`adapter_name`), and its recipe with an output."""

    name: str
    recipe: Recipe


@dataclass(frozen=True)
class Trained:
    """The outcome of a training; error: empty if the adapter was written."""

    name: str
    error: str = ""
    seconds: float = 0.0


@dataclass(frozen=True)
class Cell:
    """A product in a style: one composition, with its pictures."""

    product: Item
    style: Style

    @property
    def weights(self) -> tuple[float, float]:
        """λ of the product and of the style."""
        return self.product.weight * self.style.product_weight, self.style.item.weight

    @property
    def count(self) -> int:
        """Number of its pictures."""
        return len(self.style.prompts) * len(self.style.seeds)


def cells(products: Sequence[Item], styles: Sequence[Style]) -> Iterator[Cell]:
    """Return every product in every style, product by product, so that a batch shares a product's adapter."""
    return (Cell(product, style) for product in products for style in styles)


def pictures(cell: Cell, adapters: Mapping[str, Path], settings: Settings) -> Iterator[Picture]:
    """Yield the pictures of a cell."""
    product, style = cell.product, cell.style
    files = [adapters[adapter_name(item)] for item in (product, style.item)]
    references = {item.role: str(item.picture) for item in (product, style.item) if item.picture}
    made = {
        "format": FORMAT,
        "model": settings.base,
        "dtype": settings.dtype,
        "sampling": settings.sampling,
        **({"c2pa": settings.c2pa} if settings.c2pa else {}),
        "adapters": [[known_digest(file), weight] for file, weight in zip(files, cell.weights, strict=True)],
        "null_space": style.null_space,
    }
    scored_by = _scored_by(settings, references)
    for index, prompt in enumerate(style.prompts):
        text = prompt.replace(PRODUCT, product.called).replace(STYLE, style.item.called)
        for seed in style.seeds:
            key = digest_of(canonical_json({**made, "prompt": text, "seed": seed})).removeprefix("sha256:")
            name = f"{index:02d}-seed{seed}-{key[:12]}.png"
            yield Picture(
                key=key,
                product=product.name,
                style=style.item.name,
                prompt=text,
                seed=seed,
                parts=tuple(zip(map(str, files), cell.weights, strict=True)),
                null_space=style.null_space,
                file=f"pictures/{product.folder}/{style.item.folder}/{name}",
                references=references,
                scored_by=scored_by,
            )


def adapter_name(item: Item) -> str:
    """Return the name of a product's or style's adapter, which differs for a product and a style of one name."""
    return f"{item.role}/{item.folder}"


def _scored_by(settings: Settings, references: Mapping[str, str]) -> str:
    sheet = settings.sheet.model_dump(mode="json") if settings.sheet else None
    logos = [known_digest(logo.picture) for logo in settings.sheet.logo] if settings.sheet else []
    pictures = {role: known_digest(path) for role, path in references.items()}
    metrics = list(settings.metrics) if settings.metrics is not None else None
    return digest_of(canonical_json({"sheet": sheet, "logos": logos, "references": pictures, "metrics": metrics}))


def recipe_digest(record: Mapping[str, Any], picture: Path, base: str) -> str:
    """Return the digest of a training run: its recipe without paths, the picture's bytes, the base model."""
    said = {key: value for key, value in record.items() if key not in ("images", "output")} | {"model": base}
    digest = hashlib.sha256(canonical_json(said) + file_digest(picture).encode())
    for beside in sorted(picture.parent.glob(f"{glob.escape(picture.stem)}.*")):  # its mask and its caption
        if beside != picture and (beside.suffix == ".txt" or ".mask" in beside.suffixes):
            digest.update(beside.name.encode() + file_digest(beside).encode())
    return digest.hexdigest()


def record_of(picture: Picture, settings: Settings) -> dict[str, Any]:
    """Return the record for a picture's file, by which it is found again and can be made again."""
    return {
        "key": picture.key,
        "product": picture.product,
        "style": picture.style,
        "prompt": [picture.prompt],
        "seed": picture.seed,
        "adapter": [f"{Path(path).name}:{weight:g}" for path, weight in picture.parts],
        "null_space": picture.null_space,
        "model": settings.model,
        **settings.sampling,
    }
