"""The keys of a LoRA file, whatever program wrote it: each names a layer and a part of its ΔW, or is no part of a LoRA.

diffusers      transformer.<layer>.lora_A.weight; older <layer>.lora.down.weight, <layer>.processor.to_q_lora.down
PEFT, fal      base_model.model.<layer>.lora_A.weight
ai-toolkit     diffusion_model.<layer>.lora_A.weight
kohya, musubi  lora_unet_<layer, flattened>.lora_down.weight with .alpha; OneTrainer: lora_transformer_
XLabs          double_blocks.0.processor.qkv_lora1.down.weight
lightning      <layer>.lora_down.weight with .alpha
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence

from qrlora.method.adapter.record import require

_PARTS = re.compile(
    r"(?P<name>.+?)\.(?:lora_(?P<peft>[AB])(?:\.\w+)?\.weight"
    r"|(?:lora_|lora\.|lora_linear_layer\.)?(?P<side>down|up|mid)\.weight"
    r"|(?P<alpha>alpha))"
)
_PEFT_SIDES = {"A": "down", "B": "up"}
_PREFIX = re.compile(r"(?:base_model\.model\.|(?:model\.)?diffusion_model\.|transformer\.|unet\.|lycoris_)+")
_FLAT_PREFIX = re.compile(r"lora_(?:unet|transformer)[._]|lycoris_")
_PROCESSOR = re.compile(r"\.processor\.(to_[qkv]|to_out)_lora$")

LEFT_OUT = re.compile(
    r"(?:base_model\.model\.)?"
    r"(?:lora_te\d?[._]|lora_prior_te|text_encoders?(?:_\d)?\.|text_model\.|te\d\.|conditioner\."  # text encoders
    r"|bundle_emb\.|(?:clip_[lg]|t5|t5xxl|emb_params)$).*"  # embeddings of new words
)
"""Keys of a text encoder or of new words' embeddings: an adapter has no place for them."""

_REFUSED = {
    "DoRA": re.compile(r".*\.(dora_scale|lora_magnitude_vector)\b.*"),
    "LoHa": re.compile(r".*\.hada_\w+"),
    "LoKr": re.compile(r".*\.lokr_\w+"),
    "OFT": re.compile(r".*\.(oft_\w+|oft_R\..*)"),
    "(IA)³": re.compile(r".*\.(ia3_l.*|on_input)"),
    "GLoRA": re.compile(r".*\.[ab][12]\.weight"),
    "whole differences": re.compile(r".*\.(diff|w_norm|set_weight)"),
    "biases": re.compile(r".*\.(diff_b|b_norm|bias|lora_[AB](\.\w+)?\.bias|lora_(up|down)\.bias)"),
}
"""Changes of a layer that are no product of two small matrices."""


def without_others(keys: Iterable[str]) -> tuple[list[str], list[str]]:
    """Return the keys of the denoiser, and the names, without their endings, of the others."""
    keys = sorted(keys)
    others = [key for key in keys if LEFT_OUT.fullmatch(key)]
    kept = [key for key in keys if not LEFT_OUT.fullmatch(key)]
    require(
        bool(kept) or not others,
        "a LoRA of text encoders or embeddings alone",
        expected="layers of a denoiser",
        got=others,
        remedy="an adapter holds a denoiser's layers only: give this file to a program that loads the others",
    )
    return kept, sorted({_PARTS.sub(r"\g<name>", key) for key in others})


def refuse_other_methods(keys: Sequence[str]) -> None:
    """Raise AdapterFileError if keys belong to a method whose ΔW is no product of two small matrices; it names it."""
    found = {method: [key for key in keys if pattern.fullmatch(key)] for method, pattern in _REFUSED.items()}
    found = {method: theirs for method, theirs in found.items() if theirs}
    require(
        not found,
        f"no plain LoRA: {' and '.join(found)}",
        expected="for every layer a down and an up",
        got="; ".join(f"{method}: {theirs}" for method, theirs in found.items()),
        remedy="merge the file into its base model with the program that it comes from, and take the difference with "
        "`qrlora extract`",
    )


def pairs_of(keys: Sequence[str]) -> dict[str, dict[str, str]]:
    """Name in the file -> {"down": key, "up": key} with "mid" and "alpha" where there is one; nothing is left over."""
    pairs: dict[str, dict[str, str]] = {}
    unknown, twice = [], []
    for key in keys:
        match = _PARTS.fullmatch(key)
        if match is None:
            unknown.append(key)
            continue
        side = match["side"] or match["alpha"] or _PEFT_SIDES[match["peft"]]
        parts = pairs.setdefault(match["name"], {})
        twice += [key] if side in parts else []
        parts[side] = key
    half = sorted(name for name, parts in pairs.items() if not {"down", "up"} <= set(parts))
    require(not twice, "keys that name a layer again", expected="one pair per layer", got=twice)
    require(
        bool(pairs) and not unknown and not half,
        "no LoRA of a form that is known here",
        expected="for every layer a down and an up",
        got=f"unknown keys: {unknown or 'none'}; layers without one of the two: {half or 'none'}",
        remedy="take the original file; docs/exchange.md lists the forms that are read",
    )
    return pairs


def bare(name: str) -> str:
    """Return a layer's name without the prefixes of programs, and without the older diffusers' attention processor."""
    name = _PREFIX.sub("", name, count=1) if _PREFIX.match(name) else name
    flat = _FLAT_PREFIX.match(name)
    name = name[flat.end() :] if flat else name
    match = _PROCESSOR.search(name)
    if not match:
        return name
    return f"{name[: match.start()]}.{match[1]}" + (".0" if match[1] == "to_out" else "")


def form_of(names: Mapping[str, object]) -> str:
    """Return which program's spelling this is, for the record; nothing depends on it."""
    kinds = {"lora_transformer": "OneTrainer", "lora_unet": "kohya", "diffusion_model": "ai-toolkit"}
    kinds |= {"base_model": "peft", "transformer.": "diffusers", "unet.": "diffusers"}
    return next((kind for start, kind in kinds.items() if all(name.startswith(start) for name in names)), "bare")
