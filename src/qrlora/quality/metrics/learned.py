"""Metrics by pretrained networks: DINOv2, CLIP, CSD, LPIPS, with weights from the local disk.

    networks = FeatureNetworks({"dino": "models/dinov2-base"})     # a folder, or an id in the Hugging Face cache
    networks.similarity("dino", picture, reference)

Nothing is downloaded: an error names missing weights and the command that downloads them.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import normalize

from qrlora.errors import ModelError
from qrlora.quality.images.read import MeasuredPicture

LEAVE_OUT = "or choose metrics that do without it"
HEAD_WIDTH = 64
"""Width of an attention head in all of OpenAI's CLIP models; it cannot be read from a checkpoint's tensors."""


class FeatureNetworks:
    """Networks loaded on first use, with a cache of the features of pictures and prompts.

    Args:
        weights: name in NETWORKS -> a folder, a file, or an id in the Hugging Face cache.
        device: "cuda", "cpu", ...; None: a GPU if there is one.

    Raises (all methods):
        ModelError: weights are missing, or belong to another network.
    """

    def __init__(self, weights: Mapping[str, str] | None = None, device: str | None = None) -> None:
        self.weights = {name: source.default for name, source in NETWORKS.items()} | dict(weights or {})
        self.device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        self._networks: dict[str, Any] = {}
        self._features: dict[tuple[str, MeasuredPicture], Tensor] = {}
        self._texts: dict[str, Tensor] = {}

    def load(self, name: str) -> Any:
        """Load the network with this name in NETWORKS."""
        if name not in self._networks:
            self._networks[name] = NETWORKS[name].load(self.weights[name], self.device)
        return self._networks[name]

    def similarity(self, name: str, picture: MeasuredPicture, reference: MeasuredPicture) -> float:
        """Return the cosine of the features of two pictures."""
        return float(self.features(name, picture) @ self.features(name, reference))

    def text_similarity(self, picture: MeasuredPicture, text: str) -> float:
        """Return the cosine of the CLIP features of a picture and a text, which is truncated to CLIP's length."""
        if text not in self._texts:
            self._texts[text] = normalize(self.load("clip").text_features(text), dim=-1)
        return float(self.features("clip", picture) @ self._texts[text])

    def distance(self, picture: MeasuredPicture, reference: MeasuredPicture) -> float:
        """Return LPIPS of a picture and a reference cropped to its size."""
        return self.load("lpips")(picture, reference)

    def features(self, name: str, picture: MeasuredPicture) -> Float[Tensor, " features"]:
        """Return the normalised features of a picture, float32 on the CPU."""
        if (name, picture) not in self._features:
            self._features[name, picture] = normalize(self.load(name)(picture), dim=-1)
        return self._features[name, picture]


@dataclass(frozen=True)
class Network:
    """A network that maps a picture, and for CLIP a text, to features on the CPU."""

    module: Any
    processor: Any
    device: torch.device
    vector: Callable[[Any, Tensor], Tensor]  # (module, pixel values (1, 3, h, w)) -> (1, features)
    tokenizer: Any = None

    @torch.inference_mode()
    def __call__(self, picture: MeasuredPicture) -> Float[Tensor, " features"]:
        """Return a picture's features; it is preprocessed as the network's configuration says, by Pillow everywhere."""
        pixels = self.processor(images=picture.image, return_tensors="pt")["pixel_values"].to(self.device)
        return self.vector(self.module, pixels)[0].float().cpu()

    @torch.inference_mode()
    def text_features(self, text: str) -> Float[Tensor, " features"]:
        """Return the features of a text, in the space of the pictures."""
        tokens = self.tokenizer([text], padding=True, truncation=True, return_tensors="pt").to(self.device)
        return _projected(self.module.get_text_features(**tokens))[0].float().cpu()


def _projected(found: Any) -> Tensor:
    """Return the projection: transformers returns it itself, or since 5.2 as the pooler_output of its output."""
    return found if isinstance(found, Tensor) else found.pooler_output


def _dino(source: str, device: torch.device) -> Network:
    from transformers import AutoModel

    module = _pretrained("dino", AutoModel, source).to(device).eval()

    def first_token(network: Any, pixels: Tensor) -> Tensor:
        return network(pixel_values=pixels).last_hidden_state[:, 0]

    return Network(module, _processor("dino", source), device, first_token)


def _clip(source: str, device: torch.device) -> Network:
    from transformers import AutoTokenizer, CLIPModel

    module = _pretrained("clip", CLIPModel, source).to(device).eval()

    def projected(network: Any, pixels: Tensor) -> Tensor:
        return _projected(network.get_image_features(pixel_values=pixels))

    return Network(module, _processor("clip", source), device, projected, _pretrained("clip", AutoTokenizer, source))


def _pretrained(name: str, kind: Any, source: str, **options: Any) -> Any:
    """A local pretrained object of transformers, or ModelError."""
    from huggingface_hub import snapshot_download

    try:
        # The folder, because AutoModel queries the hub for adapters of an id in spite of local_files_only.
        folder = source if Path(source).is_dir() else snapshot_download(source, local_files_only=True)
        return kind.from_pretrained(folder, local_files_only=True, **options)
    except (OSError, ValueError) as error:
        where = f"--weights {name}=FOLDER"
        raise ModelError(
            f"{NETWORKS[name].title} is not on this machine",
            expected=f"a folder as transformers saves it, or {source!r} in the Hugging Face cache",
            got=str(error).strip().splitlines()[0],
            remedy=f"get it once with `hf download {NETWORKS[name].default}`, or name a folder: {where}; {LEAVE_OUT}",
        ) from error


def _processor(name: str, source: str) -> Any:
    from transformers import AutoImageProcessor

    return _pretrained(name, AutoImageProcessor, source, backend="pil")


def _csd(source: str, device: torch.device) -> Network:
    """CSD (Somepalli et al. 2024, arXiv 2404.01292): the tower of OpenAI's CLIP, and a projection trained for style."""
    from transformers import CLIPImageProcessor

    tower, head = style_network(_checkpoint(source))
    tower, head = tower.to(device).eval(), head.to(device)

    def style(network: Any, pixels: Tensor) -> Tensor:
        return network(pixel_values=pixels).pooler_output @ head

    side = tower.config.image_size
    sizes: dict[str, Any] = {"size": {"shortest_edge": side}, "crop_size": {"height": side, "width": side}}
    return Network(tower, CLIPImageProcessor(**sizes), device, style)


def _checkpoint(source: str) -> dict[str, Tensor]:
    """The tensors of a CSD checkpoint; a pickle is read with weights_only, so it cannot run code."""
    expected = "the checkpoint of github.com/learn2phoenix/CSD (ViT-L), as .safetensors or .pth"
    remedy = f"download it, and name it: `qrlora evaluate --weights csd=FILE`; {LEAVE_OUT}"
    if not source or not Path(source).is_file():
        raise ModelError("CSD has no weights here", expected=expected, got=source or "no file named", remedy=remedy)
    try:
        if source.endswith(".safetensors"):
            from safetensors.torch import load_file

            return load_file(source)
        with torch.serialization.safe_globals([argparse.Namespace]):  # the checkpoint holds training options, too
            found = torch.load(source, map_location="cpu", weights_only=True)
    except Exception as error:  # the readers raise many types on a broken file
        got = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
        raise ModelError(f"unreadable weights: {source}", expected=expected, got=got, remedy=remedy) from error
    return found.get("model_state_dict", found)


TOWER = {
    r"class_embedding": "embeddings.class_embedding",
    r"positional_embedding": "embeddings.position_embedding.weight",
    r"conv1\.weight": "embeddings.patch_embedding.weight",
    r"ln_pre\.(weight|bias)": r"pre_layrnorm.\1",
    r"ln_post\.(weight|bias)": r"post_layernorm.\1",
    r"transformer\.resblocks\.(\d+)\.ln_([12])\.(weight|bias)": r"encoder.layers.\1.layer_norm\2.\3",
    r"transformer\.resblocks\.(\d+)\.attn\.out_proj\.(weight|bias)": r"encoder.layers.\1.self_attn.out_proj.\2",
    r"transformer\.resblocks\.(\d+)\.mlp\.c_fc\.(weight|bias)": r"encoder.layers.\1.mlp.fc1.\2",
    r"transformer\.resblocks\.(\d+)\.mlp\.c_proj\.(weight|bias)": r"encoder.layers.\1.mlp.fc2.\2",
}
"""Names in OpenAI's CLIP -> names in transformers. Queries, keys and values are one tensor in OpenAI's."""


def style_network(checkpoint: Mapping[str, Any]) -> tuple[Any, Float[Tensor, "width features"]]:
    """Return the tower (transformers' CLIPVisionModel) and the style head of a CSD checkpoint.

    Raises:
        ModelError: missing or unexpected tensors; the error lists all of them.
    """
    from transformers import CLIPVisionConfig, CLIPVisionModel

    tensors = {str(name).removeprefix("module."): value for name, value in checkpoint.items()}
    tower = {k.removeprefix("backbone."): v for k, v in tensors.items() if k.startswith("backbone.")}
    needed = ("last_layer_style", "backbone.conv1.weight", "backbone.positional_embedding")
    missing = [name for name in needed if name not in tensors]
    if missing:
        raise ModelError("not a CSD checkpoint", expected=f"tensors {list(needed)}", got=f"without {missing}")
    width, _, patch, _ = tower["conv1.weight"].shape
    layers = {int(found[1]) for name in tower if (found := re.match(r"transformer\.resblocks\.(\d+)\.", name))}
    network = CLIPVisionModel(
        CLIPVisionConfig(
            hidden_size=width,
            intermediate_size=4 * width,
            num_hidden_layers=len(layers),
            num_attention_heads=max(1, width // HEAD_WIDTH),
            image_size=round((len(tower["positional_embedding"]) - 1) ** 0.5) * patch,
            patch_size=patch,
            hidden_act="quick_gelu",
        )
    )
    _fill(network, _renamed(tower))
    return network, tensors["last_layer_style"].float()


def _renamed(tower: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors under transformers' names, with the joint projections split, float32."""
    renamed: dict[str, Tensor] = {}
    for name, value in tower.items():
        joined = re.fullmatch(r"transformer\.resblocks\.(\d+)\.attn\.in_proj_(weight|bias)", name)
        if joined:
            for part, piece in zip("qkv", value.float().chunk(3), strict=True):
                renamed[f"encoder.layers.{joined[1]}.self_attn.{part}_proj.{joined[2]}"] = piece
            continue
        pattern = next((pattern for pattern in TOWER if re.fullmatch(pattern, name)), None)
        renamed[re.sub(pattern, TOWER[pattern], name) if pattern else name] = value.float()
    return renamed


def _fill(network: Any, tensors: dict[str, Tensor]) -> None:
    own = network.state_dict()
    prefix = "vision_model." if any(name.startswith("vision_model.") for name in own) else ""
    tensors = {prefix + name: value for name, value in tensors.items()}
    wrong = sorted(set(own) ^ set(tensors)) + sorted(
        name for name in set(own) & set(tensors) if own[name].shape != tensors[name].shape
    )
    if wrong:
        raise ModelError(
            "not a CSD checkpoint", expected=f"the {len(own)} tensors of its tower", got=f"differing: {wrong}"
        )
    network.load_state_dict(tensors)


def _lpips(source: str, device: torch.device) -> Callable[[MeasuredPicture, MeasuredPicture], float]:
    """LPIPS (Zhang et al. 2018) on AlexNet, by torchmetrics; `source` is a folder of torch's hub, "" for its own."""
    try:
        from torchmetrics.image.lpip import LearnedPerceptualImagePatchSimilarity
        from torchvision.models import AlexNet_Weights
    except (ImportError, RuntimeError) as error:  # torchvision raises RuntimeError with a torch it was not built for
        remedy = f"pip install 'qrlora[lpips]' (torchvision of the same source as torch); {LEAVE_OUT}"
        raise ModelError("LPIPS needs torchmetrics and torchvision", got=error, remedy=remedy) from error
    folder = Path(source or torch.hub.get_dir())
    url = AlexNet_Weights.IMAGENET1K_V1.url
    file = folder / "checkpoints" / url.rsplit("/", 1)[1]
    if not file.is_file():
        raise ModelError(
            "LPIPS has no weights of AlexNet here",
            expected=file,
            got="no such file",
            remedy="get it once: python -c \"import torchvision; torchvision.models.alexnet(weights='DEFAULT')\", or "
            f"put it there ({url}), or name the folder above checkpoints: "
            f"`qrlora evaluate --weights lpips=FOLDER`; {LEAVE_OUT}",
        )
    before = torch.hub.get_dir()
    torch.hub.set_dir(str(folder))
    try:
        network = LearnedPerceptualImagePatchSimilarity(net_type="alex", normalize=True).to(device)
    finally:
        torch.hub.set_dir(before)

    @torch.inference_mode()
    def distance(picture: MeasuredPicture, reference: MeasuredPicture) -> float:
        height, width = picture.pixels.shape[:2]
        both = (picture.pixels, reference.fitted(width, height))
        first, second = (torch.tensor(p).permute(2, 0, 1)[None].float().to(device) / 255 for p in both)
        return float(network(first, second))

    return distance


@dataclass(frozen=True)
class NetworkSource:
    """The title of a network, the default place of its weights, and its loader."""

    title: str
    default: str
    load: Callable[[str, torch.device], Any]


NETWORKS = {
    "dino": NetworkSource("DINOv2", "facebook/dinov2-base", _dino),
    "clip": NetworkSource("CLIP", "openai/clip-vit-base-patch32", _clip),
    "csd": NetworkSource("CSD", "", _csd),
    "lpips": NetworkSource("LPIPS", "", _lpips),
}
