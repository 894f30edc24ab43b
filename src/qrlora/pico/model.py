"""pico as stock classes: every part of a ``StableDiffusion3Pipeline``, small, built from configs."""

from __future__ import annotations

import json
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderDC, FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline
from jaxtyping import Float
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModelWithProjection, CLIPTokenizer

LATENT_SIZE, LATENT_CHANNELS = 16, 16
TOKENS = 24
"""Length of a tokenised prompt on the small world, start and end included."""
LONG_TOKENS = 40
"""Length of a tokenised prompt on the wide world, whose captions describe."""
SHIFT = 3.0
"""Shift of the noise levels, as in SD3. Adapters trained on pico draw theirs on the shifted grid; without it they would
hardly see the levels above 0.95, where a whole picture's ground and colours are decided."""
_SPECIAL = ("<|startoftext|>", "<|endoftext|>")


def autoencoder() -> Any:
    """8x autoencoder: (b, 3, 128, 128) in [-1, 1] to (b, 16, 16, 16) and back.

    Pixels are only rearranged on the way (2x2 blocks into channels), so most work is done on small maps.
    """
    layout: dict[str, Any] = {
        "block_types": "ResBlock",
        "block_out_channels": (16, 16, 64, 256),
        "qkv_multiscales": ((),) * 4,
    }
    sides = {f"{side}_{k}": v for side in ("encoder", "decoder") for k, v in layout.items()}
    vae: Any = AutoencoderDC(
        **sides, latent_channels=LATENT_CHANNELS, encoder_layers_per_block=(0, 1, 1, 0),
        decoder_layers_per_block=(0, 1, 1, 1), encoder_out_shortcut=False, decoder_in_shortcut=False,
    )  # fmt: skip
    # what the pipeline asks of every autoencoder's config, and AutoencoderDC does not have of itself
    vae.register_to_config(block_out_channels=layout["block_out_channels"], shift_factor=0.0)
    return vae


@torch.no_grad()
def start_from_principal_components(vae: Any, pictures: Float[Tensor, "b 3 h w"]) -> None:
    """Make the autoencoder the best linear one on 8x8 patches, before any training.

    With every residual branch at zero, encoder and decoder only rearrange pixels (the fourth channel in four is
    spare), and the last convolution of the one and the first of the other hold 16 principal components of the patches.
    The decoder ends in RMS norm and ReLU; a large constant in the last four channels makes the two nearly linear.
    """
    constant, lift = 16.0, 2.0
    for module in vae.modules():
        if type(module).__name__ == "ResBlock":
            module.norm.weight.zero_()
        elif type(module).__name__ in ("DCDownBlock2d", "DCUpBlock2d") and module.shortcut:
            module.conv.weight.zero_(), module.conv.bias.zero_()
    encoder, decoder = vae.encoder, vae.decoder
    for conv in (encoder.conv_in.conv, encoder.conv_out, decoder.conv_in, decoder.conv_out.conv):
        conv.weight.zero_(), conv.bias.zero_()
    encoder.conv_in.conv.weight[range(3), range(3), 1, 1] = 1.0
    patches = encoder.conv_in(pictures)
    for block in encoder.down_blocks:
        patches = block(patches)
    patches = patches.movedim(1, -1).flatten(0, -2)
    values, vectors = torch.linalg.eigh(torch.cov(patches.T))
    values, vectors = values[-LATENT_CHANNELS:], vectors[:, -LATENT_CHANNELS:]
    scale = values**-0.25  # halfway to white: detail counts for more than its share of the variance, not for all of it
    scale = scale / (values * scale**2).mean().sqrt()
    encoder.conv_out.weight[:, :, 1, 1] = (vectors * scale).T
    encoder.conv_out.bias.copy_(-(vectors * scale).T @ patches.mean(0))
    decoder.conv_in.weight[:, :, 1, 1] = vectors / scale
    decoder.conv_in.bias.copy_(patches.mean(0))
    decoder.up_blocks[1][-1].norm.bias[12:] = constant
    decoder.norm_out.weight[:12], decoder.norm_out.weight[12:] = constant / 2, 0.0
    decoder.norm_out.bias[:12], decoder.norm_out.bias[12:] = lift, 0.0
    decoder.conv_out.conv.weight[range(12), range(12), 1, 1] = 1.0
    decoder.conv_out.conv.bias.fill_(-lift)


def denoiser() -> Any:
    """MMDiT: 6 joint blocks of width 160 over 64 picture tokens."""
    return SD3Transformer2DModel(
        sample_size=LATENT_SIZE, patch_size=2, in_channels=LATENT_CHANNELS, out_channels=LATENT_CHANNELS,
        num_layers=6, attention_head_dim=32, num_attention_heads=5, caption_projection_dim=160,
        joint_attention_dim=256, pooled_projection_dim=256, pos_embed_max_size=8, qk_norm="rms_norm",
    )  # fmt: skip


def text_encoder(vocab_size: int, tokens: int = TOKENS) -> Any:
    """A CLIP text encoder of width 128 with two layers (the pipeline reads the first one's output, and the pooled)."""
    config = CLIPTextConfig(
        vocab_size=vocab_size, hidden_size=128, intermediate_size=512, projection_dim=128, num_hidden_layers=2,
        num_attention_heads=4, max_position_embeddings=tokens, bos_token_id=0, eos_token_id=1, pad_token_id=1,
    )  # fmt: skip
    return CLIPTextModelWithProjection(config)


def tokenizer(captions: list[str], merges: int = 400) -> CLIPTokenizer:
    """A byte-level BPE tokenizer whose merges come from ``captions``; any string at all can be tokenised."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    blank = Tokenizer(models.BPE(continuing_subword_prefix="", end_of_word_suffix="</w>"))
    probe = CLIPTokenizer(vocab={t: i for i, t in enumerate(_SPECIAL)}, merges=[])
    blank.normalizer, blank.pre_tokenizer = probe.backend_tokenizer.normalizer, probe.backend_tokenizer.pre_tokenizer
    trainer = trainers.BpeTrainer(
        vocab_size=2 * len(alphabet) + merges, initial_alphabet=alphabet, end_of_word_suffix="</w>", show_progress=False
    )
    blank.train_from_iterator(captions, trainer)
    learned: Any = [tuple(m) for m in json.loads(blank.to_str())["model"]["merges"]]
    words = [*_SPECIAL, *alphabet, *(a + "</w>" for a in alphabet), *("".join(m) for m in learned)]
    vocab = {w: i for i, w in enumerate(dict.fromkeys(words))}
    return CLIPTokenizer(vocab=vocab, merges=learned, model_max_length=TOKENS)


def saved_tokenizer(folder: Path) -> CLIPTokenizer:
    """The tokenizer that ``save_pretrained`` wrote to ``folder``, without what loading notes about the folder."""
    kept = json.loads((folder / "tokenizer.json").read_text())["model"]
    length = json.loads((folder / "tokenizer_config.json").read_text())["model_max_length"]
    merges: Any = [tuple(merge) for merge in kept["merges"]]
    return CLIPTokenizer(vocab=kept["vocab"], merges=merges, model_max_length=length)


def build(words: CLIPTokenizer, seed: int = 0) -> Any:
    """An untrained pico that reads text by this tokenizer."""
    torch.manual_seed(seed)
    return StableDiffusion3Pipeline(
        transformer=denoiser(), vae=autoencoder(), scheduler=FlowMatchEulerDiscreteScheduler(shift=SHIFT),
        text_encoder=text_encoder(len(words), words.model_max_length), tokenizer=words,
        text_encoder_2=text_encoder(len(words), words.model_max_length), tokenizer_2=words,
        text_encoder_3=None, tokenizer_3=None,
    )  # fmt: skip


@torch.no_grad()
def tell_words_apart(pipe: Any, captions: list[str]) -> None:
    """Make the words that ``captions`` lack as different from each other as those that they have.

    No gradient reaches the embedding of a token that training never meets. It keeps the length it was drawn with, a
    seventh of what the others grow to, and drowns in that of its place: any two new words, a subject's trigger and a
    style's among them, would mean nearly the same to the denoiser. So it gets the length of the others.
    """
    met = sorted({token for caption in captions for token in pipe.tokenizer(caption).input_ids})
    for encoder in (pipe.text_encoder, pipe.text_encoder_2):
        rows = encoder.get_input_embeddings().weight
        new = torch.ones(len(rows), dtype=torch.bool)
        new[met] = False
        rows[new] *= (rows[~new].norm(dim=1).mean() / rows[new].norm(dim=1))[:, None]


def save(pipe: Any, path: Path) -> None:
    """Write the pipeline in half precision, in the layout that the stock ``from_pretrained`` reads.

    Unless told a dtype, diffusers loads its models in float32, and transformers its own in the one that their config
    names. So the configs of the text encoders name float32, or the pipeline would load in two dtypes and could not run.
    """
    copy: Any = StableDiffusion3Pipeline(**{k: deepcopy(v) for k, v in pipe.components.items()})
    for part in (copy.transformer, copy.vae, copy.text_encoder, copy.text_encoder_2):
        part.half()
    copy.save_pretrained(path)
    for part in ("text_encoder", "text_encoder_2"):
        config = path / part / "config.json"
        config.write_text(json.dumps(json.loads(config.read_text()) | {"dtype": "float32"}, indent=2) + "\n")


def load(path: Path) -> Any:
    """A saved pico in float32. The pipeline class wants to be told that there is no T5."""
    absent = {"text_encoder_3": None, "tokenizer_3": None}
    pipe: Any = StableDiffusion3Pipeline.from_pretrained(path, dtype=torch.float32, **absent)
    pipe.set_progress_bar_config(disable=True)
    return pipe
