"""The target weights of a base model as its files hold them, read one at a time: no pipeline is built.

weights, family = stored_weights("black-forest-labs/FLUX.1-dev")
weights["transformer_blocks.0.attn.to_q"]       # one memory-mapped layer
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from huggingface_hub import snapshot_download
from peft import LoraConfig
from peft.tuners.tuners_utils import check_target_module_exists
from safetensors import safe_open
from torch import Tensor

from qrlora._reading import parsing
from qrlora.errors import ModelError, TunerError
from qrlora.models.families import INDEX, find_model, from_hub
from qrlora.models.families.base import ModelFamily

_FILE = "diffusion_pytorch_model.safetensors"
_FLOATING = ("F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2")


class StoredWeights(Mapping[str, Tensor]):
    """Layer name -> base weight in `dtype`, read from its safetensors file at each access.

    Attributes:
        shapes: layer name -> shape of its weight, in the order of the files.
    """

    def __init__(self, files: Mapping[str, Path], shapes: Mapping[str, tuple[int, ...]], dtype: torch.dtype):
        self._files, self.shapes, self._dtype = files, shapes, dtype

    def __getitem__(self, name: str) -> Tensor:
        with _opened(self._files[name]) as file:
            return file.get_tensor(f"{name}.weight").to(self._dtype)

    def __iter__(self) -> Iterator[str]:
        return iter(self.shapes)

    def __len__(self) -> int:
        return len(self.shapes)


def stored_weights(
    model: str | Path, targets: str | Sequence[str] | None = None, dtype: torch.dtype = torch.float32
) -> tuple[StoredWeights, ModelFamily]:
    """Return the weights that an adapter of this model targets, and the model's family.

    Args:
        model: as for `load_pipeline`. Of a hub model only the denoiser's files are downloaded.
        targets: module names or a regular expression, matched as PEFT matches `target_modules`; the family's if None.
        dtype: what the model will be loaded as: a basis belongs to the weights as they were rounded to it.

    Raises:
        ModelError: as `load_pipeline`, and for weights that are missing, unreadable or quantised.
        TunerError: `targets` match no layer.
    """
    model = str(model)
    source, _, _, family = find_model(model)
    if not Path(source).is_dir():
        wanted = [f"{family.denoiser}/{name}" for name in ("config.json", _FILE, f"{_FILE}.index.json")]
        shards = f"{family.denoiser}/{_FILE.replace('.', '-?????-of-?????.')}"
        source = from_hub(source, snapshot_download, allow_patterns=[*wanted, shards])
    folder = Path(source, family.denoiser)
    _refuse_quantised(folder, model)
    files: dict[str, Path] = {}
    shapes: dict[str, tuple[int, ...]] = {}
    for path in _weight_files(folder, model):
        with _opened(path) as file:
            keys = set(file.keys())
            for name in _targeted(file, family.targets if targets is None else targets):
                _check_plain(name, file.get_slice(f"{name}.weight").get_dtype(), keys)
                files[name], shapes[name] = path, tuple(file.get_slice(f"{name}.weight").get_shape())
    if not shapes:
        raise TunerError(
            "targets match no layer of the denoiser",
            expected="module names such as to_q,to_k, or one regular expression for whole names",
            got=f"{targets!r}",
            remedy="leave targets out for what the family adapts by default",
        )
    return StoredWeights(files, shapes, dtype), family


def model_files(model: str | Path) -> dict[str, Path]:
    """Return the files of a base model by their names in its folder: its index, and all of its components.

    Raises:
        ModelError: as `load_pipeline`.
    """
    source, index_file, index, _ = find_model(str(model))
    if not Path(source).is_dir():
        index_file = Path(from_hub(source, DiffusionPipeline.download), INDEX)
    root = index_file.parent
    folders = [root / part for part in index if (root / part).is_dir()]
    files = sorted(path for folder in folders for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(root).as_posix(): path for path in (index_file, *files)}


def _opened(path: Path) -> Any:
    remedy = "download the model again"
    with parsing(f"the weights in {path} cannot be read", ModelError, expected="a safetensors file", remedy=remedy):
        return safe_open(path, framework="pt")


def _weight_files(folder: Path, model: str) -> list[Path]:
    """The files of a denoiser's weights, whole or in shards, in order."""
    index = folder / f"{_FILE}.index.json"
    if not index.is_file():
        names = {_FILE}
    else:
        with parsing(f"{index} is no index of weights", ModelError, remedy="download the model again"):
            names = {str(name) for name in json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()}
    missing = sorted(name for name in names if Path(name).name != name or not (folder / name).is_file())
    if missing:
        raise ModelError(
            f"{model!r} lacks weights in safetensors files",
            expected=f"{', '.join(missing)} in {folder}",
            got=", ".join(sorted(path.name for path in folder.glob("*"))) or "no such folder",
            remedy="download the model again, or save it anew with save_pretrained",
        )
    return [folder / name for name in sorted(names)]


def _targeted(file: Any, targets: str | Sequence[str]) -> list[str]:
    """The layers of a file that `targets` name, as PEFT would find them in the model."""
    layers = [key.removesuffix(".weight") for key in file.keys() if key.endswith(".weight")]  # noqa: SIM118
    sizes = {name: len(file.get_slice(f"{name}.weight").get_shape()) for name in layers}
    if isinstance(targets, str) and targets.lower() == "all-linear":
        return [name for name in layers if sizes[name] == 2]
    config = LoraConfig(target_modules=targets if isinstance(targets, str) else list(targets))
    try:
        return [name for name in layers if sizes[name] >= 2 and check_target_module_exists(config, name)]
    except re.error as error:
        raise TunerError("targets are no regular expression", got=f"{targets!r} ({error})") from error


def _refuse_quantised(folder: Path, model: str) -> None:
    with parsing(f"{folder} is no denoiser", ModelError, expected="a config.json", remedy="download the model again"):
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    if isinstance(config, dict) and config.get("quantization_config"):
        raise ModelError(
            f"{model!r} is quantised, and only its own backend can read its weights",
            expected="weights in a plain floating-point dtype",
            got=config["quantization_config"],
            remedy="use the unquantised model; or train directly, which computes the basis when the model is loaded",
        )


def _check_plain(name: str, dtype: str, keys: set[str]) -> None:
    """Refuse 8-bit floats that are not the whole value, because scales lie beside them."""
    scales = sorted(key for key in keys if key.startswith(f"{name}.") and "scale" in key.removeprefix(name))
    if dtype not in _FLOATING or scales:
        raise ModelError(
            f"the weight of {name} cannot be read as it is",
            expected=f"one of {', '.join(_FLOATING)}, without scales",
            got=f"{dtype}, {', '.join(scales) or 'no scales'}",
            remedy="use the unquantised model",
        )
