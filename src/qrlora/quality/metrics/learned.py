"""What trained networks see in pictures: DINOv2, CLIP, CSD, LPIPS. Their weights come from the user's own disk.

    eyes = Eyes({"dino": "models/dinov2-base"})     # a folder, or what the Hugging Face cache has under that name
    eyes.likeness("dino", picture, reference)

Nothing is downloaded: what is missing is said, with the command that gets it.
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
from qrlora.quality.images.read import Exhibit

LEAVE_OUT = "or choose measures that do without it"
HEAD_WIDTH = 64
"""Numbers of one attention head in all of OpenAI's CLIP models; a checkpoint's tensors do not tell it."""


class Eyes:
    """Networks that are loaded when first asked, and what they saw, kept for the next question.

    Args:
        weights: by the names of MODELS, where theirs are: a folder, a file, or an id in the Hugging Face cache.
        device: "cuda", "cpu", ...; None for a GPU if there is one.

    Raises (all methods):
        ModelError: weights that are missing, or of another network.
    """

    def __init__(self, weights: Mapping[str, str] | None = None, device: str | None = None) -> None:
        self.weights = {name: model.default for name, model in MODELS.items()} | dict(weights or {})
        self.device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        self._networks: dict[str, Any] = {}
        self._seen: dict[tuple[str, Exhibit], Tensor] = {}
        self._read: dict[str, Tensor] = {}

    def load(self, name: str) -> Any:
        """The network of this name in MODELS."""
        if name not in self._networks:
            self._networks[name] = MODELS[name].load(self.weights[name], self.device)
        return self._networks[name]

    def likeness(self, name: str, picture: Exhibit, reference: Exhibit) -> float:
        """Cosine of what the network makes of two pictures."""
        return float(self.features(name, picture) @ self.features(name, reference))

    def fit(self, picture: Exhibit, words: str) -> float:
        """Cosine of what CLIP makes of a picture and of a text; text longer than it reads is cut."""
        if words not in self._read:
            self._read[words] = normalize(self.load("clip").words(words), dim=-1)
        return float(self.features("clip", picture) @ self._read[words])

    def distance(self, picture: Exhibit, reference: Exhibit) -> float:
        """LPIPS of a picture and a reference that is cut to its size."""
        return self.load("lpips")(picture, reference)

    def features(self, name: str, picture: Exhibit) -> Float[Tensor, " features"]:
        """What the network makes of a picture, at length 1, float32 on the CPU."""
        if (name, picture) not in self._seen:
            self._seen[name, picture] = normalize(self.load(name)(picture), dim=-1)
        return self._seen[name, picture]


@dataclass(frozen=True)
class Network:
    """A picture, and for CLIP a text, to a vector on the CPU."""

    module: Any
    processor: Any
    device: torch.device
    vector: Callable[[Any, Tensor], Tensor]  # (module, pixel values (1, 3, h, w)) -> (1, features)
    tokenizer: Any = None

    @torch.inference_mode()
    def __call__(self, picture: Exhibit) -> Float[Tensor, " features"]:
        """Prepared as the network's own files say, by Pillow wherever this runs: so numbers can be compared."""
        pixels = self.processor(images=picture.image, return_tensors="pt")["pixel_values"].to(self.device)
        return self.vector(self.module, pixels)[0].float().cpu()

    @torch.inference_mode()
    def words(self, text: str) -> Float[Tensor, " features"]:
        """A text in the space of the pictures."""
        tokens = self.tokenizer([text], padding=True, truncation=True, return_tensors="pt").to(self.device)
        return _projected(self.module.get_text_features(**tokens))[0].float().cpu()


def _projected(found: Any) -> Tensor:
    """transformers gives the projection alone, or since 5.2 in the place of the pooled output."""
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
    """What transformers has under that name on this machine, or ModelError."""
    from huggingface_hub import snapshot_download

    try:
        # The folder, because AutoModel asks the hub for adapters of a name in spite of local_files_only.
        folder = source if Path(source).is_dir() else snapshot_download(source, local_files_only=True)
        return kind.from_pretrained(folder, local_files_only=True, **options)
    except (OSError, ValueError) as error:
        where = f"--weights {name}=FOLDER"
        raise ModelError(
            f"{MODELS[name].title} is not on this machine",
            expected=f"a folder as transformers saves it, or {source!r} in the Hugging Face cache",
            got=str(error).strip().splitlines()[0],
            remedy=f"get it once with `hf download {MODELS[name].default}`, or name a folder: {where}; {LEAVE_OUT}",
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
    """The tensors of a CSD checkpoint; a pickle is read for tensors alone, so that it can run nothing."""
    expected = "the checkpoint of github.com/learn2phoenix/CSD (ViT-L), as .safetensors or .pth"
    remedy = f"download it, and name it: --weights csd=FILE; {LEAVE_OUT}"
    if not source or not Path(source).is_file():
        raise ModelError("CSD has no weights here", expected=expected, got=source or "no file named", remedy=remedy)
    try:
        if source.endswith(".safetensors"):
            from safetensors.torch import load_file

            return load_file(source)
        with torch.serialization.safe_globals([argparse.Namespace]):  # training options lie beside the tensors
            found = torch.load(source, map_location="cpu", weights_only=True)
    except Exception as error:  # whatever a broken or foreign file makes the readers raise
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
"""Names in OpenAI's CLIP -> names in transformers'; queries, keys and values lie in one tensor there."""


def style_network(checkpoint: Mapping[str, Any]) -> tuple[Any, Float[Tensor, "width features"]]:
    """The tower (transformers' CLIPVisionModel) and the style head of a CSD checkpoint.

    Raises:
        ModelError: tensors that are missing or more than there should be, all of them named.
    """
    from transformers import CLIPVisionConfig, CLIPVisionModel

    tensors = {str(name).removeprefix("module."): value for name, value in checkpoint.items()}
    tower = {k.removeprefix("backbone."): v for k, v in tensors.items() if k.startswith("backbone.")}
    needed = ("last_layer_style", "backbone.conv1.weight", "backbone.positional_embedding")
    missing = [name for name in needed if name not in tensors]
    if missing:
        raise ModelError("no CSD checkpoint", expected=f"tensors {list(needed)}", got=f"without {missing}")
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
    """OpenAI's names and joined projections as transformers has them, float32."""
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
            "no CSD checkpoint", expected=f"the {len(own)} tensors of its tower", got=f"differing: {wrong}"
        )
    network.load_state_dict(tensors)


def _lpips(source: str, device: torch.device) -> Callable[[Exhibit, Exhibit], float]:
    """LPIPS (Zhang et al. 2018) on AlexNet, by torchmetrics; `source` is a folder of torch's hub, "" for its own."""
    try:
        from torchmetrics.image.lpip import LearnedPerceptualImagePatchSimilarity
        from torchvision.models import AlexNet_Weights
    except (ImportError, RuntimeError) as error:  # torchvision raises the latter beside a torch it was not built for
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
            f"put it there ({url}), or name the folder above checkpoints: --weights lpips=FOLDER; {LEAVE_OUT}",
        )
    before = torch.hub.get_dir()
    torch.hub.set_dir(str(folder))
    try:
        network = LearnedPerceptualImagePatchSimilarity(net_type="alex", normalize=True).to(device)
    finally:
        torch.hub.set_dir(before)

    @torch.inference_mode()
    def distance(picture: Exhibit, reference: Exhibit) -> float:
        height, width = picture.pixels.shape[:2]
        both = (picture.pixels, reference.fitted(width, height))
        first, second = (torch.tensor(p).permute(2, 0, 1)[None].float().to(device) / 255 for p in both)
        return float(network(first, second))

    return distance


@dataclass(frozen=True)
class Model:
    """A network that measures need: what it is called, where its weights are unless said, and what loads it."""

    title: str
    default: str
    load: Callable[[str, torch.device], Any]


MODELS = {
    "dino": Model("DINOv2", "facebook/dinov2-base", _dino),
    "clip": Model("CLIP", "openai/clip-vit-base-patch32", _clip),
    "csd": Model("CSD", "", _csd),
    "lpips": Model("LPIPS", "", _lpips),
}
