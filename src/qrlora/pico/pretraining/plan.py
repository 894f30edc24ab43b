"""Define all settings that decide the result of a pretraining run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any

import click


@dataclass(frozen=True)
class Plan:
    """All settings that decide the result. Times on two cores are in the model card."""

    seed: int = 0
    pictures: int = 24_000
    decoder_steps: int = 1_500
    decoder_batch: int = 8
    decoder_lr: float = 1e-3
    denoiser_steps: int = 4_500
    denoiser_batch: int = 48
    muon_lr: float = 0.02
    muon_bf16: int = 0  # 1: Muon's iteration in bfloat16; -1: where the processor has units for it
    adam_lr: float = 1.5e-3
    time_mean: float = 0.4  # of the logit of the noise's share. A whole picture's colours are decided above 0.95, where
    time_spread: float = 1.4  # the usual logit-normal (0, 1) looks in one sample of 600 and this one in 28
    cool: float = 0.3  # the last share of the denoiser's steps, in which the learning rates fall to zero
    novelties: int = 0  # pictures more, with shapes and styles that have no name (`world.novel`)
    novel_share: float = 0.3  # of the denoiser's examples, if there are any; as often of every kind
    focus: str = ""  # styles to draw twice as often as the others, separated by commas
    caption_dropout: float = 0.1
    long_null: float = 0.03  # share of steps with the 256 zero tokens that the stock pipeline sends by default
    threads: int = 0
    bf16: int = 0  # 1: forward and backward in bfloat16, weights in float32 (half the time a step with bfloat16 units)
    compile: int = 0  # 1: torch.compile the denoiser (two minutes to start, a quarter less time a step)
    device: str = "cpu"
    wide: int = 4_000  # most shards of 500 pictures of the wide world
    first_shards: int = 8  # before the first step
    shard_steps: int = 200  # steps to one shard more
    warm: float = 0.02  # the first share of the wide world's steps, in which the learning rates rise
    ema: float = 0.999  # decay of the moving average that is exported after training on the wide world
    start: str = ""  # a saved pipeline to train further, instead of starting from nothing


def options_of(plan: type) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Give a click command an option for every field of a plan."""

    def decorate(command: Callable[..., Any]) -> Callable[..., Any]:
        for one in reversed(fields(plan)):
            flag = "--" + one.name.replace("_", "-")
            command = click.option(flag, type=type(one.default), default=one.default, show_default=True)(command)
        return command

    return decorate
