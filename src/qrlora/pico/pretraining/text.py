"""Captions as tokens and as what the denoiser reads."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from diffusers import StableDiffusion3Pipeline
from torch import Tensor
from transformers import CLIPTokenizer

from qrlora.pico import model, world
from qrlora.pico.pretraining.plan import Plan
from qrlora.pico.world import nameless, wide


def all_captions() -> list[str]:
    """Every wording about seen subjects and styles: what the tokenizer's merges are learned from."""
    scenes = [world.sample_scene(i, subject=s, style=t) for i, (s, t) in enumerate(world.SEEN_PAIRS * 8)]
    return [world.caption(scene, i % 6 + 100 * (i % 2)) for i, scene in enumerate(scenes)]


def words(work: Path, plan: Plan) -> CLIPTokenizer:
    """The tokenizer of this run: that of the pipeline it starts from, or one fitted once and kept in ``work``.

    A tokenizer fitted again may number its words otherwise, since merges that are as frequent as one another come in
    any order.
    """
    folder = (Path(plan.start) if plan.start else work) / "tokenizer"
    if not folder.exists():
        model.tokenizer(all_captions()).save_pretrained(folder)
    return model.saved_tokenizer(folder)


def embed(pipe: Any, captions: list[str], null_tokens: int) -> tuple[Tensor, Tensor]:
    """Encode prompts as ``encode_prompt`` does, with gradients: (b, 24 + null_tokens, 256) and (b, 256)."""
    ids = pipe.tokenizer(
        captions, padding="max_length", max_length=pipe.tokenizer.model_max_length, truncation=True, return_tensors="pt"
    ).input_ids.to(pipe.transformer.device)
    outs = [e(ids, output_hidden_states=True) for e in (pipe.text_encoder, pipe.text_encoder_2)]
    hidden = torch.cat([o.hidden_states[-2] for o in outs], -1)
    hidden = torch.cat([hidden, hidden.new_zeros(len(captions), null_tokens, hidden.shape[-1])], 1)
    return hidden, torch.cat([o.text_embeds for o in outs], -1)


# ---------------------------------------------------------------- the words of the wide world


def wide_words() -> list[str]:
    """Every word that captions of the wide world are made of, but those in pointed brackets; and their syllables.

    Names of reserved things and styles are not among them: these words stay as new as the things.
    """
    texts = [*wide.SEEN_THINGS, *wide.DESIGNERS, *world.COLOURS, *world.BACKGROUNDS]
    texts += [*world.SEEN_SUBJECTS, *world.SEEN_STYLES]
    texts += [fact for facts in wide.DESCRIPTIONS.values() for fact in facts]
    texts += [fact for number in range(nameless.STYLE_COUNT) for fact in nameless.description(number)]
    texts += ["a photo of picture in style background small on the left right at top bottom"]
    plain = {word for text in texts for word in text.replace("-", " - ").split() if word.isalpha()}
    return sorted(plain) + sorted({word[i : i + 2] for word in wide.all_words() for i in (1, 3)})


def widened(known: CLIPTokenizer) -> CLIPTokenizer:
    """``known`` with merges added until each of ``wide_words`` is one token. What it read as one token it still does.

    Added merges rank below the known ones, so they join what these leave apart.
    """
    model_ = json.loads(known.backend_tokenizer.to_str())["model"]
    merges: Any = [tuple(m) if isinstance(m, list) else tuple(m.split(" ")) for m in model_["merges"]]
    vocab, rank = dict(model_["vocab"]), {m: i for i, m in enumerate(merges)}
    for word in wide_words():
        pieces = _pieces(word, rank)
        while len(pieces) > 1:
            pair = (pieces[0], pieces[1])
            rank[pair] = len(rank)
            merges.append(pair)
            vocab.setdefault("".join(pair), len(vocab))
            pieces = _pieces(word, rank)
    return CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=model.LONG_TOKENS)


def _pieces(word: str, rank: dict[tuple[str, ...], int]) -> list[str]:
    """Byte-pair encoding of one plain word."""
    pieces = [*word[:-1], word[-1] + "</w>"]
    while len(pieces) > 1:
        best = min(pairwise(pieces), key=lambda pair: rank.get(pair, len(rank)))
        if best not in rank:
            break
        joined, i = [], 0
        while i < len(pieces):
            both = tuple(pieces[i : i + 2]) == best
            joined.append("".join(best) if both else pieces[i])
            i += 2 if both else 1
        pieces = joined
    return pieces


@torch.no_grad()
def widen(pipe: Any) -> Any:
    """A trained pipeline that reads the wide world's captions: more tokens, and more of them in a prompt.

    A new token begins as the mean of those that spelled it, as long as the others are on average; a new place begins
    as the last known one, which mostly held padding.
    """
    known, words_ = pipe.tokenizer, widened(pipe.tokenizer)
    if words_.model_max_length == known.model_max_length and len(words_) == len(known):
        return pipe
    torch.manual_seed(len(words_))
    fresh = [model.text_encoder(len(words_), words_.model_max_length) for _ in range(2)]
    added = {i: word.removesuffix("</w>") for word, i in words_.get_vocab().items() if i >= len(known)}
    spelled = {i: known(word, add_special_tokens=False).input_ids for i, word in added.items()}
    for old, new in zip((pipe.text_encoder, pipe.text_encoder_2), fresh, strict=True):
        state, grown = old.state_dict(), new.state_dict()
        for name, value in grown.items():
            if value.shape == state[name].shape:
                value.copy_(state[name])
            elif "position" in name:
                value.copy_(torch.cat([state[name], state[name][-1:].expand(len(value) - len(state[name]), -1)]))
            else:
                length = state[name].norm(dim=1).mean()
                value[: len(known)] = state[name]
                for i, ids in spelled.items():
                    row = state[name][ids].mean(0) + 0.3 * length * torch.nn.functional.normalize(value[i], dim=0)
                    value[i] = row / row.norm() * length
        new.load_state_dict(grown)
    parts = {"transformer": pipe.transformer, "vae": pipe.vae, "scheduler": pipe.scheduler}
    return StableDiffusion3Pipeline(
        **parts, text_encoder=fresh[0], tokenizer=words_, text_encoder_2=fresh[1], tokenizer_2=words_,
        text_encoder_3=None, tokenizer_3=None,
    )  # fmt: skip
