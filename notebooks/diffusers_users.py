# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # For diffusers users
#
# Train a style from one picture, load it with stock diffusers, compose it with a subject, export the composition. Each
# step says what it corresponds to in diffusers and PEFT. Everything runs on pico, the base model of 8 million
# parameters that ships with `qrlora`: no GPU, no download, about a minute of processor time.
#
# The files are written into the folder that the notebook runs in.

# %%
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch
from diffusers import StableDiffusion3Pipeline
from PIL import Image

import qrlora
from qrlora import Composition, Recipe, attach, basis_of, export_adapter, load_adapter, load_pipeline, pico, train

# %% tags=["parameters"]
STEPS = 120  # of training
DENOISING_STEPS = 20

# %%
STARTERS = Path(qrlora.__file__).parent / "apps/studio/starters"  # a picture and an adapter each: teapot, chalk, ...


def show(**pictures):
    """Show pictures side by side under their names."""
    _, axes = plt.subplots(1, len(pictures), figsize=(2.2 * len(pictures), 2.5), squeeze=False)
    for place, (name, picture) in zip(axes[0], pictures.items(), strict=True):
        place.imshow(picture)
        place.set_title(name.replace("_", " "), fontsize=9)
        place.axis("off")


# %% [markdown]
# ## 1. Train
#
# `train(Recipe(...))` is what `train_dreambooth_lora_sd3.py` does: the same loss (flow matching), AdamW, cached
# latents and text embeddings. Two things differ: no LoRA pair is trained but ΔR alone, and the basis Q that ΔR stands
# on is computed from the base weights (truncated SVD, then QR), not stored in the file.
#
# `noun` names what the picture shows, so that the style is what remains: the picture is a *car*, as a mosaic.

# %%
recipe = Recipe(
    role="style",
    images=str(STARTERS / "mosaic.png"),
    noun="car",
    steps=STEPS,
    batch_size=4,
    cooldown_steps=STEPS // 2,
    learning_rate=5e-3,
    logit_mean=0.5,
    logit_std=1.5,
    output="mosaic.safetensors",
)
style = train(recipe, progress=lambda at: at.step % 20 or print(f"step {at.step} of {at.steps}, loss {at.loss:.4f}"))
show(the_one_picture=Image.open(STARTERS / "mosaic.png"))

# %% [markdown]
# ## 2. The file
#
# A compact adapter: ΔR of every layer and its metadata. It is half of a LoRA of the same rank, and does not pretend to
# be one: stock PEFT refuses it rather than loading it wrong. The last line counts what is true of this model.

# %%
meta = style.metadata
print(f"rank {meta.rank}, alpha {meta.alpha:g}, columns {meta.columns[:4]}... of a basis of rank {meta.basis_rank}")
count = style.parameters()
print(f"{count.trained:,} trained parameters; a LoRA of this rank has {count.lora_same_rank:,}")

# %% [markdown]
# ## 3. Load it with stock diffusers
#
# `export_adapter(..., "diffusers")` writes the pair up = Q, down = s·ΔR under diffusers' names. From there on nothing
# of `qrlora` is involved: `load_lora_weights`, as for any LoRA.
#
# Before it writes, it checks by diffusers' own loading rules that every layer is found.

# %%
ours, family = load_pipeline("pico")  # a diffusers pipeline, with the facts of its family
export_adapter(style, "style-diffusers.safetensors", "diffusers", ours, family, basis=basis_of(ours.transformer, style))


def stock():
    """Return pico as diffusers alone loads it."""
    pipe = StableDiffusion3Pipeline.from_pretrained(pico.path(), text_encoder_3=None, tokenizer_3=None)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def sample(pipe, prompt, seed=0):
    """Return one picture, by the pipeline's own call."""
    options = {"num_inference_steps": DENOISING_STEPS, "guidance_scale": pico.SETTINGS["guidance"]}
    return pipe(prompt, generator=torch.Generator().manual_seed(seed), **options).images[0]


theirs = stock()
before = sample(theirs, "a photo of a red mug in <s> style")
theirs.load_lora_weights("style-diffusers.safetensors", adapter_name="mosaic")
after = sample(theirs, "a photo of a red mug in <s> style")
theirs.delete_adapters("mosaic")
removed = sample(theirs, "a photo of a red mug in <s> style")
show(base_model=before, with_the_style=after, removed_again=removed)
assert np.array_equal(before, removed) and not np.array_equal(before, after)

# %% [markdown]
# ## 4. Compose
#
# In diffusers two LoRAs are combined by `set_adapters(["teapot", "mosaic"], [1.0, 1.0])`: both stay loaded, and every
# adapted layer computes two more products. Here all adapters of one base model share Q, so their weighted sum is again
# one adapter, exact: Σ λᵢ ΔRᵢ. `set_adapters` works, too; the two give the same picture.
#
# `attach` puts an adapter on a denoiser as a PEFT layer (`pipe.transformer.add_adapter` in PEFT's terms).

# %%
subject = load_adapter(STARTERS / "teapot.safetensors")
prompt = "a photo of a teal <c> in <s> style"
ours.set_progress_bar_config(disable=True)
attach(ours.transformer, subject, "teapot")
attach(ours.transformer, style, "mosaic")
ours.set_adapters(["teapot", "mosaic"], [1.0, 1.0])
two_adapters = sample(ours, prompt)
ours.delete_adapters(["teapot", "mosaic"])

plain = Composition([(subject, 1.0), (style, 1.0)])
attach(ours.transformer, plain.adapter(), "sum")
one_adapter = sample(ours, prompt)
ours.delete_adapters("sum")
show(set_adapters=two_adapters, Composition=one_adapter)
away = np.abs(np.asarray(two_adapters, int) - np.asarray(one_adapter, int)).max()
print(f"they differ by at most {away} of 255 levels")
assert away <= 4

# %% [markdown]
# PEFT's `add_weighted_adapter(combination_type="linear")` is something else: it adds the factors, (Σ λᵢ Bᵢ)(Σ λᵢ Aᵢ),
# which is not Σ λᵢ Bᵢ Aᵢ. For two files that share one up matrix it is wrong; so compose here, then export.
#
# ## 5. The strength of null-space projection
#
# Nothing in diffusers corresponds to this. Both adapters read the same input; each ΔRᵢ loses the share c of what lies
# in the row space of the other. 0 is the plain sum, 0.5 the default of a subject with a style.

# %%
pictures = {}
for strength in (0.0, 0.5, 1.0):
    composed = Composition([(subject, 1.0), (style, 1.0)], null_space=strength)
    attach(ours.transformer, composed.adapter(), "both")
    pictures[f"c_=_{strength:g}"] = sample(ours, prompt)
    ours.delete_adapters("both")
    print(f"c = {strength:g}: {composed.energy_kept():.2f} of the energy of the plain sum")
show(**pictures)

# %% [markdown]
# What is proven is a share over many pairs on pico, not that every picture gets better: see "Does it really separate?"
# in the documentation (`docs/compare.md`).
#
# ## 6. Export the composition
#
# One file, for any LoRA loader; the rank is that of the columns of both (16 + 16). In stock diffusers it gives the
# picture that it gives here.

# %%
both = Composition([(subject, 1.0), (style, 1.0)], null_space=0.5).adapter()
export_adapter(both, "both-diffusers.safetensors", "diffusers", ours, family, basis=basis_of(ours.transformer, both))
theirs.load_lora_weights("both-diffusers.safetensors", adapter_name="both")
exported = sample(theirs, prompt)
show(here=pictures["c_=_0.5"], stock_diffusers=exported)
away = np.abs(np.asarray(exported, int) - np.asarray(pictures["c_=_0.5"], int)).max()
print(f"they differ by at most {away} of 255 levels")
assert away <= 4

# %% [markdown]
# Next: your own loop with `QRLoraConfig` in place of `LoraConfig` (`docs/from-diffusers.md`), files of other tools
# (`docs/exchange.md`), and the second notebook, `researchers.py`.
