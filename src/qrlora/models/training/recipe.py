"""The complete, validated description of one training run.

    Recipe.load("mug.toml", {"steps": 300})        # a TOML file, with overrides
    Recipe(role="subject", images="mug.png")       # or in Python

Every field has one definition, here: the command line's flags, the TOML keys and the recipe kept in the adapter's
metadata are all read off this class.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from qrlora._reading import parsing, plain_number, read_toml, required_field, unknown_field, wrong_value
from qrlora._said import Said, joined, said
from qrlora.errors import RecipeError

TRIGGER = "[trigger]"
"""In a caption: the place of the trigger."""

REFERENCE = "registry:"
"""Beginning of a field that names something in a registry; the command line puts a file in its place."""
TRIGGERS = {"subject": "<c>", "style": "<s>"}
DEFAULT_RANK = 16
ONE_PICTURE, SEVERAL_PICTURES = 1e-3, 1e-2
"""Default learning rates of pico; of other models the first alone, since the second was measured on none of them."""
SPACE = {"learning_rate": 0.03, "weight_decay": 0.1}
"""Defaults of coefficients in a space, which are counted in standard deviations."""

# What may change between a run and its resumption without making it another run.
RESUMABLE = frozenset(
    {
        *("steps", "checkpoint_every", "checkpoints_kept", "output", "images", "space", "licence"),
        *("gradient_checkpointing", "offload", "fsdp"),
        *("sample_every", "sample_prompts", "sample_seeds", "patience", "log_with"),
    }
)


def default_caption(role: str, noun: str) -> str:
    """Return the published prompts: "a photo of a <c> dog" for a subject, "a cat in <s> style" for a style."""
    if role == "subject":
        return f"a photo of a {TRIGGER} {noun}".rstrip()
    noun = noun or "picture"
    article = "an" if noun[0].lower() in "aeiou" else "a"
    return f"{article} {noun} in {TRIGGER} style"


def module_names(text: str) -> str | tuple[str, ...]:
    """Split "to_q,to_k" of the command line into names; what is not a list of names is a regular expression."""
    if re.fullmatch(r"[\w.]+(\s*,\s*[\w.]+)+", text):
        return tuple(part.strip() for part in text.split(","))
    return text


class Recipe(BaseModel):
    """One training run. Unset fields take the defaults of the role; see each field's description.

    Raises RecipeError (by `Recipe.of`, `Recipe.load` and `replace`) that names every unknown, missing or wrong field.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    model: str = Field("pico", description="base model: pico, a folder in the diffusers layout, or a hub id")
    method: Literal["qrlora", "lora"] = Field("qrlora", description="qrlora, or plain lora for comparison")
    role: Literal["subject", "style"] = Field(description="what the adapter learns: subject or style")
    images: tuple[Path, ...] = Field(
        min_length=1,
        description="pictures to train on: one, several, or a folder (captions and masks: docs/data.md)",
    )
    num_repeats: tuple[Annotated[int, Field(ge=1)], ...] = Field(
        (),
        description="how often an epoch shows the pictures of each entry of images: a number for each (default: once)",
    )
    buckets: bool = Field(
        False, description="keep aspect ratios: crop to shapes of about resolution squared pixels instead of squares"
    )
    flip: bool = Field(False, description="train also on the mirror image of every picture")
    shift: int = Field(
        0,
        ge=0,
        description="train also on four copies of every picture, moved by so many pixels left, right, up, down (0: no)",
    )
    alpha_mask: bool = Field(False, description="take a picture's transparency for its mask, unless it has a mask file")
    mask_min_value: float = Field(
        0.0, ge=0, le=1, description="loss weight of the pixels outside the mask; 1 ignores masks"
    )
    trigger: str = Field(
        min_length=1,
        description="word that calls the adapter in prompts (default: <c> for a subject, <s> for a style)",
    )
    noun: str = Field("", description="what the picture shows, in a word the model knows: dog, house")
    caption: str = Field(
        min_length=1, description=f"caption of pictures that have none of their own; {TRIGGER} stands for the trigger"
    )
    rank: int = Field(DEFAULT_RANK, ge=1, description="rank of the adapter: rows of ΔR in each layer")
    alpha: int = Field(ge=1, description="the update is scaled by alpha / rank (default: the rank, so scaling 1)")
    columns: str | tuple[int, ...] = Field(
        description="columns of Q that the adapter trains: subject or style (disjoint halves), i/n (every n-th "
        "from i), first (as published), or a list of numbers (default: the role's)"
    )
    basis_rank: int | None = Field(
        None, ge=1, description="rank of the whole basis (default: the least that has those columns)"
    )
    triangular: bool = Field(True, description="keep ΔR upper triangular")
    train_basis: bool = Field(False, description="published mode: train Q and R; cannot be composed exactly")
    targets: str | tuple[str, ...] | None = Field(
        None,
        description="layers to adapt: names (to_q,to_k), a regular expression, or all-linear (default: the family's)",
    )
    preserve: tuple[str, ...] = Field(
        (), description="prompts whose pictures should stay as the base model makes them; separated by ; in a flag"
    )
    preserve_weight: float = Field(1.0, gt=0, description="weight of preserve in the loss")
    steps: int = Field(200, ge=1, description="optimiser steps")
    batch_size: int = Field(8, ge=1, description="examples per forward pass, of all processes together")
    accumulation: int = Field(1, ge=1, description="forward passes per optimiser step")
    optimizer: Literal["adamw", "adamw8bit", "prodigy", "schedulefree"] = Field(
        "adamw", description="adamw; or adamw8bit, prodigy, schedulefree, which need a package (docs/training.md)"
    )
    learning_rate: float = Field(
        ONE_PICTURE,
        gt=0,
        description="learning rate for one picture (default in a space: 0.03; prodigy: a factor of its estimate, 1)",
    )
    learning_rate_several: float = Field(
        gt=0,
        description="learning rate for two pictures or more (default: learning_rate; but if that is not given, "
        f"{SEVERAL_PICTURES} for method qrlora on pico)",
    )
    warmup_steps: int = Field(0, ge=0, description="first steps, over which the learning rate rises to its value")
    cooldown_steps: int = Field(0, ge=0, description="last steps, over which the learning rate falls to zero")
    weight_decay: float = Field(1e-4, ge=0, description="weight decay of ΔR (default in a space: 0.1)")
    space: Path | None = Field(
        None, description="space file (qrlora space build): train the coefficients of a point in it"
    )
    space_remainder: float = Field(0.0, ge=0, description="weight of a free ΔR beside the coefficients in the space")
    logit_mean: float | None = Field(
        None,
        description="noise levels in training: mean of their logit, higher is noisier (flow matching; default 0)",
    )
    logit_std: float | None = Field(None, gt=0, description="standard deviation of that logit (default 1)")
    min_snr_gamma: float | None = Field(
        None, gt=0, description="min-SNR weighting of the loss: min(SNR, this) / SNR (SDXL, SD; 5 is usual)"
    )
    max_grad_norm: float = Field(1.0, gt=0, description="gradients are scaled down to this norm")
    seed: int = Field(0, ge=0, lt=2**63, description="seed of everything random in the run")
    resolution: int | None = Field(
        None, ge=8, description="side of the square training pictures in pixels (default: the model's)"
    )
    dtype: Literal["float32", "bfloat16", "float16"] = Field(
        "float32", description="precision of the frozen base; ΔR trains in float32"
    )
    quantize: Literal["", "int8", "nf4"] = Field(
        "",
        description="store the frozen base in 8 bits (int8) or 4 (nf4); its basis is that of the unquantised weights",
    )
    gradient_checkpointing: bool = Field(
        False, description="recompute activations in the backward pass: less memory, more time"
    )
    offload: bool = Field(
        False, description="run text encoders and autoencoder on the CPU, and only the denoiser on the GPU"
    )
    fsdp: bool = Field(False, description="divide the frozen base among the processes (FSDP2)")
    checkpoint_every: int = Field(0, ge=0, description="steps between checkpoints (0: only when interrupted)")
    checkpoints_kept: int = Field(1, ge=1, description="number of newest checkpoints that stay on disk")
    sample_every: int = Field(
        0, ge=0, description="steps between sheets of sample pictures, written beside the output (0: none)"
    )
    sample_prompts: tuple[str, ...] = Field(
        (),
        description=f"prompts of the sheets, {TRIGGER} for the trigger; separated by ; (default: the caption)",
    )
    sample_seeds: int = Field(2, ge=1, description="sample pictures of each prompt; their seeds count up from seed")
    patience: int = Field(
        0, ge=0, description="sheets without a better score after which training stops (0: never); needs --judge"
    )
    log_with: str | None = Field(
        None,
        description="trackers of accelerate, separated by commas (tensorboard, wandb, ...), or none "
        "(default: tensorboard if it is installed)",
    )
    output: Path | None = Field(None, description="adapter file to write; checkpoints go to a folder beside it")
    licence: str = Field("", description="licence of the adapter, written into its metadata")

    @model_validator(mode="before")
    @classmethod
    def _defaults(cls, data: Any) -> Any:
        """Fill what depends on other fields, so that a recipe once made is complete and explicit."""
        if not isinstance(data, Mapping) or str(data.get("role")) not in TRIGGERS:
            return data
        role, noun = data["role"], data.get("noun") or ""
        defaults = {
            "trigger": TRIGGERS[role],
            "caption": default_caption(role, noun) if isinstance(noun, str) else "",
            "alpha": data.get("rank", DEFAULT_RANK),
            "columns": role,
        }
        given = {key: value for key, value in data.items() if value is not None}
        defaults |= SPACE if "space" in given else {}
        if given.get("optimizer") == "prodigy":
            defaults["learning_rate"] = 1.0
        measured = (given.get("model", "pico"), given.get("method", "qrlora")) == ("pico", "qrlora")
        rate = SEVERAL_PICTURES if measured else ONE_PICTURE
        defaults["learning_rate_several"] = (defaults | given).get("learning_rate", rate)
        return defaults | given

    @field_validator("*", mode="before")
    @classmethod
    def _plain(cls, value: Any, about: Any) -> Any:
        """Read numbers that the command line gives as text; booleans and 1_0 are no numbers."""
        annotation = cls.model_fields[about.field_name].annotation
        return plain_number(value) if {int, float} & {annotation, *get_args(annotation)} else value

    @field_validator("images", mode="before")
    @classmethod
    def _one_or_many(cls, value: Any) -> Any:
        return (value,) if isinstance(value, (str, Path)) else value

    @field_validator("num_repeats", mode="before")
    @classmethod
    def _counted(cls, value: Any) -> Any:
        """Accept 10, and "10,1" from the command line."""
        if isinstance(value, str):
            value = [part.strip() for part in value.split(",")]
        return plain_number([value] if isinstance(value, int) else value)

    @field_validator("preserve", "sample_prompts", mode="before")
    @classmethod
    def _separated(cls, value: Any) -> Any:
        """Accept "a red mug; a blue lamp" from the command line."""
        return tuple(part.strip() for part in value.split(";") if part.strip()) if isinstance(value, str) else value

    @field_validator("targets", mode="before")
    @classmethod
    def _named(cls, value: Any) -> Any:
        return module_names(value) if isinstance(value, str) else value

    @field_validator("output")
    @classmethod
    def _safetensors(cls, value: Path | None) -> Path | None:
        if value is not None and value.suffix != ".safetensors":
            raise ValueError("adapters are .safetensors files")
        return value

    @field_validator("columns", mode="before")
    @classmethod
    def _listed_columns(cls, value: Any) -> Any:
        """Accept "0,2,4" from the command line."""
        if isinstance(value, str) and re.fullmatch(r"[0-9]{1,9}( *, *[0-9]{1,9})*", value):
            return tuple(int(part) for part in value.split(","))
        return value if isinstance(value, str) else plain_number(value)

    @model_validator(mode="after")
    def _consistent(self) -> Recipe:
        if TRIGGER not in self.caption and self.trigger not in self.caption:
            facts = {"caption": repr(self.caption), "place": TRIGGER, "trigger": repr(self.trigger)}
            raise ValueError(said("caption %(caption)s has neither %(place)s nor the trigger %(trigger)s", **facts))
        if self.method == "lora" and self.train_basis:
            raise ValueError("train_basis = true has no meaning with method = 'lora', which has no basis")
        if self.num_repeats and len(self.num_repeats) != len(self.images):
            raise ValueError(
                f"num_repeats has {len(self.num_repeats)} numbers for {len(self.images)} entries of images"
            )
        if self.optimizer == "schedulefree" and self.cooldown_steps:
            raise ValueError("cooldown_steps has no meaning with optimizer = 'schedulefree', which averages instead")
        if self.space_remainder and not self.space:
            raise ValueError("space_remainder has no meaning without a space")
        if self.space and (self.method != "qrlora" or self.train_basis):
            raise ValueError("a space is of ΔR on a frozen basis: method = 'qrlora', train_basis = false")
        for one, other in (("space", "preserve"), ("space", "fsdp"), ("quantize", "fsdp")):
            if getattr(self, one) and getattr(self, other):
                raise ValueError(f"{one} and {other} have not been made to work together: choose one")
        if self.offload and self.preserve:
            raise ValueError("offload keeps the encoders off the device, and preserve makes pictures there: choose one")
        return self

    @classmethod
    def of(cls, fields: Mapping[str, Any]) -> Recipe:
        """Validate these fields and return the recipe.

        Raises:
            RecipeError: naming every unknown (with the nearest known), missing or wrong field.
        """
        try:
            return cls.model_validate(dict(fields))
        except ValidationError as error:
            raise RecipeError(
                said("this recipe cannot be run:\n  - %(lines)s", lines=joined(_explain(error), "\n  - ")),
                remedy="`qrlora train --help` describes every field",
            ) from error

    @classmethod
    def load(cls, path: str | Path, overrides: Mapping[str, Any] | None = None) -> Recipe:
        """Read a TOML recipe. Its relative paths count from its own folder; `overrides` win over it.

        Raises:
            RecipeError: no such file, not TOML, or not a valid recipe.
        """
        return cls.of(read_fields(Path(path)) | dict(overrides or {}))

    @classmethod
    def file_schema(cls) -> dict[str, Any]:
        """Return the JSON Schema of a recipe file, by which an editor completes and checks it.

        Fields that are filled in by role may be missing, and lists of one may be the one, as `of` takes them.
        """
        schema = cls.model_json_schema()
        properties = {name: _plain(facts) for name, facts in schema["properties"].items()}
        for name in ("images", "preserve", "sample_prompts"):
            facts = properties[name]
            several = {key: facts.pop(key) for key in ("type", "items", "minItems") if key in facts}
            facts["anyOf"] = [{"type": "string"}, several]
        return {
            "$schema": "http://json-schema.org/draft-07/schema#",
            "title": "qrlora recipe",
            "description": "One training run; see `qrlora train --help`.",
            "type": "object",
            "properties": properties,
            "required": ["role", "images"],
            "additionalProperties": False,
        }

    def replace(self, **changes: Any) -> Recipe:
        """Return a copy with some fields changed, validated again. A learning rate that is given holds for any number
        of pictures, as in a recipe file."""
        if "learning_rate" in changes:
            changes.setdefault("learning_rate_several", changes["learning_rate"])
        return Recipe.of(self.model_dump() | changes)

    @property
    def text(self) -> str:
        """The caption with the trigger in its place."""
        return self.caption.replace(TRIGGER, self.trigger)

    def record(self) -> dict[str, Any]:
        """The resolved recipe as JSON values for the adapter's metadata: pictures and output by name, not by path."""
        fields = self.model_dump(mode="json")
        fields["images"] = [image.name for image in self.images]
        for name in ("output", "space"):
            path = getattr(self, name)
            fields[name] = path.name if path else None
        return fields

    def of_pictures(self, count: int) -> Recipe:
        """Return the recipe with the learning rate for this number of pictures."""
        rate = self.learning_rate if count < 2 else self.learning_rate_several
        several = self.learning_rate_several
        return self if rate == self.learning_rate else self.replace(learning_rate=rate, learning_rate_several=several)

    def run_record(self) -> dict[str, Any]:
        """Return the fields that a checkpoint must agree on to be continued."""
        free = RESUMABLE - {"steps"} if self.cooldown_steps else RESUMABLE  # the last steps count from the end
        return {key: value for key, value in self.model_dump(mode="json").items() if key not in free}

    @property
    def digest(self) -> str:
        """SHA-256 of the record as canonical JSON."""
        return hashlib.sha256(json.dumps(self.record(), sort_keys=True).encode()).hexdigest()


def read_fields(path: Path) -> dict[str, Any]:
    """Read the fields of a TOML recipe as they stand there; relative paths count from its own folder.

    Raises:
        RecipeError: no such file, or not TOML.
    """
    fields = read_toml(path, "the recipe", RecipeError, remedy="see recipes/ for examples")
    with parsing(f"a path in {path} cannot be followed", RecipeError, remedy="correct it"):
        return _anchored(fields, path.parent)


def _anchored(fields: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Paths of a recipe file, made relative to where it lies. A model is a path only if it is there, and what refers to
    a registry is none."""

    def path(text: str) -> Path:
        return Path(text) if text.startswith(REFERENCE) else folder / text

    anchored = dict(fields)
    images = fields.get("images")
    if isinstance(images, str):
        anchored["images"] = path(images)
    elif isinstance(images, list) and all(isinstance(image, str) for image in images):
        anchored["images"] = [path(image) for image in images]
    for name in ("output", "space"):
        if isinstance(fields.get(name), str):
            anchored[name] = path(fields[name])
    if isinstance(fields.get("model"), str) and (folder / fields["model"]).is_dir():
        anchored["model"] = str(folder / fields["model"])
    return anchored


def _plain(facts: dict[str, Any]) -> dict[str, Any]:
    """A field's schema without what TOML has no word for: titles of pydantic's making, and null."""
    kept = {key: value for key, value in facts.items() if key != "title" and not (key == "default" and value is None)}
    choices = [choice for choice in kept.pop("anyOf", []) if choice != {"type": "null"}]
    return kept | (choices[0] if len(choices) == 1 else {"anyOf": choices} if choices else {})


def _explain(error: ValidationError) -> list[Said]:
    """Describe the wrong fields, one a line."""
    lines = []
    for number, item in enumerate(error.errors()):
        name = ".".join(str(part) for part in item["loc"][:1])
        if item["type"] == "extra_forbidden":
            near = difflib.get_close_matches(name, Recipe.model_fields, n=1, cutoff=0.5) if number < 20 else []
            lines.append(unknown_field(name, near))
        elif item["type"] == "missing":
            # Without a role, what would be filled from it is missing too: naming the role is enough.
            if name in ("role", "images") or not any(i["loc"] == ("role",) for i in error.errors()):
                lines.append(required_field(name, Recipe.model_fields[name].description))
        else:
            lines.append(wrong_value(name, item))
    return list(dict.fromkeys(lines))
