"""The supported architectures, one small file each, and how a base model is found.

pipe, family = load_pipeline("pico")            # or a folder, or a hub id
family_of(pipe).name                            # "sd3"
"""

from __future__ import annotations

import contextlib
import importlib
import json
import logging
import math
import pkgutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import diffusers
import psutil
import torch
import transformers
from huggingface_hub import errors as hub_errors
from huggingface_hub import hf_hub_download
from safetensors import SafetensorError, safe_open

from qrlora._reading import parsing, visible
from qrlora.errors import ModelError
from qrlora.models.families.base import Conditions, ModelFamily, size_unit
from qrlora.models.families.flux import FLUX
from qrlora.models.families.flux2_klein import FLUX2_KLEIN
from qrlora.models.families.qwen_image import QWEN_IMAGE
from qrlora.models.families.sd import SD
from qrlora.models.families.sd3 import SD3
from qrlora.models.families.sdxl import SDXL
from qrlora.models.families.z_image import Z_IMAGE

__all__ = [
    "EMBEDDED",
    "FAMILIES",
    "Conditions",
    "ModelFamily",
    "default_device",
    "family_of",
    "find_model",
    "from_hub",
    "load_pipeline",
    "load_structure",
    "refuse_if_larger",
    "size_unit",
]

FAMILIES: dict[str, ModelFamily] = {
    family.pipeline_class: family for family in (FLUX, FLUX2_KLEIN, QWEN_IMAGE, SD, SD3, SDXL, Z_IMAGE)
}
"""Pipeline class name -> family. A new architecture is a new file and its name here."""

EMBEDDED: dict[str, str] = {"pico": "qrlora.pico"}
"""Base models known by a short name -> the module with their folder, `path()`, and with what they do other than their
family, `SETTINGS`. Named in words rather than imported, because an embedded model is built on top of the families."""

INDEX = "model_index.json"
REMARKS = ("diffusers.configuration_utils", "diffusers.pipelines.pipeline_utils")
"""Loggers that warn about an embedded model's autoencoder."""


def family_of(pipeline: Any) -> ModelFamily:
    """Return the family of a pipeline (or of a pipeline class name).

    Raises:
        ModelError: no family describes that class; lists those that exist.
    """
    name = pipeline if isinstance(pipeline, str) else type(pipeline).__name__
    if name not in FAMILIES:
        known = ", ".join(f"{family.name} ({family.pipeline_class})" for family in FAMILIES.values())
        raise ModelError(
            "no model family for this pipeline",
            expected=f"one of {known}",
            got=name,
            remedy="use a model of these families, or add one: docs/families.md takes you through it",
        )
    return FAMILIES[name]


def default_device() -> torch.device:
    """Return a CUDA device if there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def load_pipeline(
    model: str | Path, dtype: torch.dtype = torch.float32, device: torch.device | str | None = None
) -> tuple[Any, ModelFamily]:
    """Load a base model, ready to generate; return the pipeline and its family.

    Args:
        model: a name of `EMBEDDED`, a folder in the diffusers layout, or a hub id such as "owner/name".
        dtype: what the weights are loaded as.
        device: where to; `default_device()` if not given.

    Raises:
        ModelError: not found, gated, unreachable, unreadable, of no known family, or larger than the free memory. All
            but unreadable is said before any weight is loaded (of a model not downloaded yet the size is not known).
    """
    model = str(model)
    source, found, index, family = find_model(model)
    device = torch.device(device or default_device())
    size = sum(weight_bytes(found.parent / name, dtype) for name in index if (found.parent / name).is_dir())
    for place in {torch.device("cpu"), device}:
        refuse_if_larger(size, place, model)
    return _assemble(model, source, family, index, dtype=dtype).to(device), family


def load_structure(model: str | Path, dtype: torch.dtype = torch.float32) -> tuple[Any, ModelFamily]:
    """Load a base model without its weights, every network on the meta device; return it and its family.

    Of a hub model only configs and tokenizers are fetched. Arguments and errors: as `load_pipeline`.
    """
    model = str(model)
    source, _, index, family = find_model(model)
    networks: dict[str, Any] = {}
    with _quietly(model), _unloadable(model, family), torch.device("meta"):
        for name, entry in index.items():
            kind: Any = _class_of(entry)
            if issubclass(kind, diffusers.ModelMixin):
                networks[name] = kind.from_config(kind.load_config(source, subfolder=name))
            elif issubclass(kind, transformers.PreTrainedModel):
                networks[name] = kind(kind.config_class.from_pretrained(source, subfolder=name))
    networks = {name: torch.nn.Module.to(network, dtype).eval() for name, network in networks.items()}
    return _assemble(model, source, family, index, **networks), family


def _class_of(entry: Any) -> type:
    """The class of a component by its entry in the index, [library or folder of diffusers' pipelines, class name];
    NoneType for what is no component, or has a name that diffusers translates (older tokenizers)."""
    if not isinstance(entry, list) or None in entry:
        return type(None)
    library, name = entry
    module = library if library in ("diffusers", "transformers") else f"diffusers.pipelines.{library}"
    return getattr(importlib.import_module(module), name, type(None))


def _assemble(model: str, source: str, family: ModelFamily, index: dict[str, Any], **given: Any) -> Any:
    """The pipeline of that folder, with these components and options given rather than read."""
    # What a pipeline was saved without (SD3's T5) has to be declined by name, or from_pretrained asks for it.
    absent = {name: None for name, value in index.items() if value == [None, None]}
    with _quietly(model), _unloadable(model, family):
        pipe = getattr(diffusers, family.pipeline_class).from_pretrained(source, **given, **absent)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@contextlib.contextmanager
def _unloadable(model: str, family: ModelFamily) -> Iterator[None]:
    """Turn what the libraries raise about an incomplete model into one ModelError."""
    try:
        yield
    except MemoryError:
        raise
    except Exception as error:  # of foreign code alone
        raise ModelError(
            f"the base model {model!r} cannot be loaded",
            expected=f"a complete {family.pipeline_class} folder",
            got=f"{type(error).__name__}: {error}",
            remedy="download it again, or check the folder's components against its " + INDEX,
        ) from error


def weight_bytes(folder: Path, dtype: torch.dtype) -> int:
    """Return the bytes of one component's weights as `dtype`, from the headers of its safetensors files.

    Variants (`model.fp16.safetensors`) do not count, nor does what is not there to be read.
    """
    total = 0
    for path in visible(folder):
        if path.suffix != ".safetensors" or len(path.suffixes) > 1:
            continue
        with (
            contextlib.suppress(SafetensorError),
            safe_open(path, framework="pt") as file,
        ):  # damage: the loader's to say
            total += sum(math.prod(file.get_slice(key).get_shape()) for key in file.keys()) * dtype.itemsize  # noqa: SIM118
    return total


def free_memory(device: torch.device) -> int:
    """Return the bytes that can still be allocated on a device."""
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else psutil.virtual_memory().available


def refuse_if_larger(size: int, device: torch.device, model: str) -> None:
    """Raise ModelError if `size` bytes of the model's weights are more than the device has free.

    Less does not mean enough: training needs room for activations too.
    """
    free = free_memory(device)
    if size > free:
        raise ModelError(
            f"the base model {model!r} does not fit into the memory of {device}",
            expected=f"{size / 2**30:.2f} GiB free for its weights alone",
            got=f"{free / 2**30:.2f} GiB free",
            remedy="load it in half (dtype bfloat16), train on it quantised or divided (docs/training.md), end other "
            "programs, or use a smaller model",
        )


def find_model(model: str) -> tuple[str, Path, dict[str, Any], ModelFamily]:
    """Find a base model: its folder or hub id, its index's file and content, and its family; nothing is loaded.

    Raises:
        ModelError: as `load_pipeline`.
    """
    embedded: Any = pkgutil.resolve_name(EMBEDDED[model]) if model in EMBEDDED else None
    source = str(embedded.path()) if embedded else model
    found = Path(source, INDEX) if Path(source).is_dir() else Path(from_hub(source, hf_hub_download, INDEX))
    index = _read_index(found, model)
    return source, found, index, replace(family_of(index["_class_name"]), **(embedded.SETTINGS if embedded else {}))


def _read_index(path: Path, model: str) -> dict[str, Any]:
    """The index of a pipeline: its class name, and the class of each component."""
    with parsing(
        f"{model!r} is not a base model in the diffusers layout",
        ModelError,
        expected=f"a folder with a {INDEX} that names its pipeline class",
        remedy="give the folder that a pipeline's save_pretrained wrote, a hub id, or 'pico'",
    ):
        index = json.loads(path.read_text(encoding="utf-8-sig"))
        index["_class_name"].strip()
        return index


def from_hub(model: str, download: Callable[..., str], *arguments: Any, **options: Any) -> str:
    """Return the path to which a function of huggingface_hub downloads a part of a model; ModelError if it cannot."""
    remedies: dict[type[Exception], str] = {
        hub_errors.GatedRepoError: f"accept its licence at https://huggingface.co/{model} and run `hf auth login`",
        hub_errors.RepositoryNotFoundError: "check the spelling; if it is private, run `hf auth login` first",
        hub_errors.LocalEntryNotFoundError: "connect to the hub once to download it, give the path of a local copy, "
        "or use the embedded model: --model pico",
        hub_errors.EntryNotFoundError: f"it has no {INDEX}: choose a model in the diffusers layout",
        hub_errors.HFValidationError: "give an existing folder, a hub id 'owner/name', or 'pico'",
    }
    remedy = "check the connection to the hub, or give the path of a local copy"
    try:
        return download(model, *arguments, **options)
    except (OSError, ValueError, hub_errors.EntryNotFoundError) as error:
        remedy = next((text for kind, text in remedies.items() if isinstance(error, kind)), remedy)
        raise ModelError(
            "no such base model",
            expected="'pico', a folder, or a hub id that can be reached",
            got=f"{model!r} ({type(error).__name__})",
            remedy=remedy,
        ) from error


@contextlib.contextmanager
def _quietly(model: str) -> Iterator[None]:
    """Silence the progress bars of loading: one per component, beside the command line's own.

    Of an embedded model diffusers also remarks that its autoencoder is not of the class that the pipeline names, and
    that the autoencoder's config has two values which the class does not take: the pipeline asks for them.
    """
    remarks = [logging.getLogger(name) for name in REMARKS] if model in EMBEDDED else []
    levels = [log.level for log in remarks]
    for remark in remarks:
        remark.setLevel(logging.ERROR)
    talkative = [log for log in (diffusers.utils.logging, transformers.utils.logging) if log.is_progress_bar_enabled()]
    for log in talkative:
        log.disable_progress_bar()
    try:
        yield
    finally:
        for remark, level in zip(remarks, levels, strict=True):
            remark.setLevel(level)
        for log in talkative:
            log.enable_progress_bar()
