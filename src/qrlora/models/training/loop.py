"""Run the training loop: one for every method and family, and for one process or several.

Several processes are accelerate's (`accelerate launch`, torchrun). Each has the base model, or with `fsdp` a part of
it, and all have the same ΔR, whose gradients are summed once a step: the recipe says what a step is, however many they
are. The base needs no wrapper for that, and a ΔR that no gradient reaches (the text stream of Qwen-Image's last block,
whose result is not used) is left alone on each.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import logging
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn

from qrlora._files import disk_error
from qrlora._interrupts import deferred
from qrlora._said import said
from qrlora.errors import OutputError, TrainingError
from qrlora.method.adapter import Adapter, adapter_from_model, save_adapter
from qrlora.method.space import coefficients_on
from qrlora.models.families import ModelFamily
from qrlora.models.training import checkpoint, monitor, outputs, space
from qrlora.models.training.attach import ADAPTER_NAME, adapter_on
from qrlora.models.training.batches import family_options, forward_passes, mix
from qrlora.models.training.dataset import EncodedDataset, Example, Report
from qrlora.models.training.optimizers import evaluated, optimizer_for
from qrlora.models.training.pictures import PLAIN
from qrlora.models.training.placement import settle
from qrlora.models.training.prepare import Prepared, first_losses, prepare
from qrlora.models.training.preservation import Preservation, record
from qrlora.models.training.processes import anywhere, check_divisible, processes_here, share, summed
from qrlora.models.training.recipe import Recipe

log = logging.getLogger(__name__)

LOSS_SCALE = 2.0**16
"""Factor of the loss on a float16 base, whose gradients would vanish between its layers otherwise."""


@dataclass(frozen=True)
class Progress:
    """Progress of a run: steps done of all steps, loss of the last step, seconds left at the pace so far."""

    step: int
    steps: int
    loss: float
    seconds_left: float


class TrainingInterrupted(KeyboardInterrupt):
    """Ctrl-C, SIGTERM or SIGHUP, which end a run after the current step. `checkpoint` is what `resume` continues
    from; None if there is no output."""

    def __init__(self, step: int, saved: object):
        self.step, self.checkpoint = step, saved
        super().__init__(f"interrupted after step {step}" + (f"; saved {saved}" if saved else "; nothing saved"))


@dataclass
class Run:
    """The state that a training step reads or changes. `loss_scale` is a power of two, 1 unless the base is in
    float16."""

    accelerator: Accelerator
    recipe: Recipe
    family: ModelFamily
    denoiser: nn.Module
    scheduler: Any
    data: EncodedDataset
    parameters: dict[str, nn.Parameter]
    optimizer: torch.optim.Optimizer
    watch: monitor.Monitor
    kept: Preservation | None = None
    step: int = 0
    loss_scale: float = 1.0

    @property
    def record(self) -> dict[str, Any]:
        """Return the recipe's fields and the digest of the data that a checkpoint must share to be resumed."""
        known = coefficients_on(self.denoiser).get("digest")
        return self.recipe.run_record() | {"data": self.data.digest, "space": known}

    def adapter(self, provenance: dict[str, Any]) -> Adapter:
        """Return the adapter as trained so far, with its metadata."""
        with evaluated(self.optimizer):
            where = coefficients_on(self.denoiser)
            return adapter_from_model(
                self.denoiser,
                ADAPTER_NAME,
                family=self.family.name,
                denoiser=self.family.denoiser,
                base_model=self.recipe.model,
                role=self.recipe.role,
                trigger=self.recipe.trigger,
                licence=self.recipe.licence,
                recipe=self.recipe.record(),
                provenance=provenance | ({"space": where} if where else {}),
            )


def train(
    recipe: Recipe,
    *,
    pipe: Any = None,
    family: ModelFamily | None = None,
    progress: Callable[[Progress], None] | None = None,
    preparing: Report | None = None,
    resume: bool = False,
    restart: bool = False,
    score: monitor.Score | None = None,
    sampled: monitor.Sampled | None = None,
) -> Adapter:
    """Train one adapter; write it to `recipe.output` if that is set.

    Under `accelerate launch` every process calls it; the main process alone writes files and reports progress.

    Args:
        recipe: the run's description.
        pipe: a loaded base model; it comes back as it was (its denoiser frozen). Without it `recipe.model` is loaded,
            and its encoders leave memory as soon as the pictures and captions are encoded.
        family: of `pipe`; looked up if not given.
        progress, preparing: called after every step, and after every picture read or encoded before.
        resume: continue from the newest checkpoint, to the ΔR of an uninterrupted run (bit for bit on a CPU).
        restart: remove the checkpoints of an earlier run, once this one is ready for its first step.
        score: of a sample sheet; the best step is returned, and training stops after `recipe.patience` worse sheets.
        sampled: called for every sample sheet with its step, its pictures, and what returns that step's adapter.

    Raises:
        ModelError, DataError, BasisError, TunerError: the model, the pictures or the basis cannot be used.
        RecipeError: no checkpoint to resume, or of another run; checkpoints in the way; too many processes.
        OutputError: the output cannot be written; if that fails at the end, the error names the file written instead.
        TrainingError, TrainingInterrupted: the loss or gradient is not finite; Ctrl-C, SIGTERM or SIGHUP.
    """
    started = time.perf_counter()
    monitor.check(recipe, score)
    accelerator = processes_here(**monitor.trackers(recipe))
    check_divisible(recipe, accelerator.num_processes, accelerator.distributed_type.value, given=pipe is not None)
    report, progress = (preparing, progress) if accelerator.is_main_process else (None, None)
    with outputs.held(recipe, resume, restart) if accelerator.is_main_process else contextlib.nullcontext():
        ready = prepare(recipe, pipe, family, accelerator, report)
        del pipe  # with it go the encoders, unless it is the caller's
        with adapter_on(ready.denoiser, ready.family, recipe, accelerator) as parameters:
            run = begin(recipe, ready, accelerator, parameters, score, sampled)
            _continue(run, ready, resume, restart)
            return _trained(run, ready.examples, progress, started)


def _continue(run: Run, ready: Prepared, resume: bool, restart: bool) -> None:
    """Load the newest checkpoint, or remove an earlier run's, as asked; print how new the pictures are to a space."""
    recipe = run.recipe
    if resume:
        run.step, run.loss_scale = checkpoint.load(recipe, run.record, run.parameters, run.optimizer)
        run.watch.resume(outputs.path_of(recipe, run.step))
    elif restart and run.accelerator.is_main_process:
        outputs.give_up(recipe)
    if recipe.space and not resume and run.accelerator.is_main_process:
        space.say_novelty(recipe, ready.denoiser, functools.partial(first_losses, recipe, ready))


def _trained(run: Run, examples: list[Example], progress: Callable[[Progress], None] | None, started: float) -> Adapter:
    """Train the remaining steps and write the adapter."""
    with run.watch.watching(run), deferred() as interrupted:  # a whole adapter is written whole
        loss = run_steps(run, interrupted, progress)
        adapter = run.watch.chosen(run, _provenance(examples, loss, time.perf_counter() - started))
        if run.recipe.output and run.accelerator.is_main_process:
            save_adapter(adapter, run.recipe.output, spelling="compact" if adapter.metadata.on_basis else "lora")
    run.accelerator.wait_for_everyone()
    return adapter


def begin(
    recipe: Recipe,
    ready: Prepared,
    accelerator: Accelerator,
    parameters: dict[str, nn.Parameter],
    score: monitor.Score | None = None,
    sampled: monitor.Sampled | None = None,
) -> Run:
    """Return the run before its first step; its trained parameters are on the denoiser."""
    recipe = recipe.of_pictures(len({example.digest for example in ready.examples if example.view == PLAIN}))
    device = ready.data.device
    settle(ready.denoiser, recipe, device, parameters.values())
    kept = _base_predictions(recipe, ready.pipe, ready.family, device) if recipe.preserve else None
    ready.pipe = None
    optimizer = optimizer_for(recipe, list(parameters.values()))
    watch = monitor.Monitor(recipe, ready.sampler, score, sampled)
    half = next(ready.denoiser.parameters()).dtype == torch.float16
    return Run(
        accelerator, recipe, ready.family, ready.denoiser, ready.scheduler, ready.data, parameters, optimizer, watch,
        kept, loss_scale=LOSS_SCALE if half else 1.0,
    )  # fmt: skip


def _base_predictions(recipe: Recipe, pipe: Any, family: ModelFamily, device: torch.device) -> Preservation:
    """Compute the base model's predictions for the preserved prompts, while the adapter is still zero."""
    pipe.to(device)
    return record(pipe, family, recipe.preserve, recipe.seed, recipe.batch_size)


def run_steps(run: Run, interrupted: Callable[[], bool], progress: Callable[[Progress], None] | None) -> float:
    """Take every remaining step, with checkpoints; return the last loss."""
    recipe, first, started, loss = run.recipe, run.step, time.perf_counter(), float("nan")
    while run.step < recipe.steps and not run.watch.satisfied:
        loss, norm = _step(run)
        run.step += 1
        try:
            run.watch.after_step(run, loss, norm)
            if progress:
                each = (time.perf_counter() - started) / (run.step - first)
                progress(Progress(run.step, recipe.steps, loss, each * (recipe.steps - run.step)))
        except OSError as error:  # a tracker's disk is full: no log is worth the steps so far
            raise _stopped(run, error) from error
        if anywhere(run.accelerator, interrupted()):
            raise TrainingInterrupted(run.step, _save_checkpoint(run))
        if recipe.checkpoint_every and (run.step % recipe.checkpoint_every == 0 or run.step == recipe.steps):
            try:
                _save_checkpoint(run, rescue=False)
            except OutputError as error:
                log.warning("%s\ntraining goes on without this checkpoint", error)
    return loss


def _stopped(run: Run, error: OSError) -> OutputError:
    """Return the error of a run that ends because something beside it cannot be written; it has been saved. Only the
    main process writes, so only it comes here, and does not wait for the others."""
    full, saved = disk_error(error), _write_checkpoint(run, rescue=True)
    then = (
        said("%(remedy)s; then continue from %(saved)s with --resume", remedy=full.remedy, saved=saved)
        if saved
        else full.remedy
    )
    return OutputError(
        said("training stopped after step %(step)s: %(what)s", step=run.step, what=full.what), got=full.got, remedy=then
    )


def _step(run: Run) -> tuple[float, float]:
    """Take one optimiser step; return its mean loss and gradient norm, unclipped. It changes nothing if it raises."""
    for group in run.optimizer.param_groups:
        group["lr"] = run.recipe.learning_rate * pace(run.recipe, run.step)
    while True:
        total, norm = _gradients(run)
        if math.isfinite(norm) and math.isfinite(total):
            break
        run.optimizer.zero_grad()
        if run.loss_scale == 1 or not math.isfinite(total):
            raise TrainingError(
                said("training broke down at step %(step)s", step=run.step + 1),
                expected="a finite loss and gradient",
                got=said("loss %(total)s, gradient norm %(norm)s", total=total, norm=norm),
                remedy=said("lower learning_rate, or train in float32%(kept)s", kept=_kept(run)),
            )
        run.loss_scale /= 2  # float16 overflowed on the way back: the same step again
    run.optimizer.step()
    run.optimizer.zero_grad()
    return total, norm


def _gradients(run: Run) -> tuple[float, float]:
    """Put the step's gradients, of all processes together, in place; returns its mean loss and their norm unclipped."""
    recipe, accelerator = run.recipe, run.accelerator
    options, total = family_options(recipe, run.family)[0], 0.0
    generator = torch.Generator().manual_seed(mix(-1 - recipe.seed, run.step))
    drawn = forward_passes(recipe, run.family, run.scheduler, run.data, run.step)
    for micro, (latents, noise, timesteps, conditions, mask) in enumerate(drawn):
        call = run.kept.draw(generator) if run.kept else None
        rows = share(recipe, micro, accelerator.process_index, accelerator.num_processes)
        if rows.start == rows.stop:
            continue
        taken = latents[rows], noise[rows], timesteps[rows], {key: value[rows] for key, value in conditions.items()}
        weights = None if mask is None else mask[rows]
        loss = run.family.loss(run.denoiser, run.scheduler, *taken, weights, **options)
        if call:
            loss = loss + recipe.preserve_weight * call.loss(run.denoiser)
        loss = loss / recipe.accumulation * ((rows.stop - rows.start) / recipe.batch_size)
        (loss * run.loss_scale).backward()
        total += loss.item()
    reached: list[Any] = [parameter for parameter in run.parameters.values() if parameter.grad is not None]
    if accelerator.num_processes > 1:
        total = summed(accelerator, torch.tensor(total, device=accelerator.device)).item()
        for parameter in reached:
            parameter.grad = summed(accelerator, parameter.grad)
    if run.loss_scale != 1:
        for parameter in reached:
            parameter.grad /= run.loss_scale
    return total, nn.utils.clip_grad_norm_(reached, recipe.max_grad_norm).item()


def pace(recipe: Recipe, step: int) -> float:
    """Return the share of the learning rate at step ``step`` (from 0): it rises, holds and falls linearly."""
    rising = (step + 1) / max(1, recipe.warmup_steps)
    falling = (recipe.steps - step) / max(1, recipe.cooldown_steps)
    return min(1.0, rising, falling)


def _save_checkpoint(run: Run, rescue: bool = True) -> Path | None:
    """Write a checkpoint from the main process alone; it is there when any process goes on."""
    failed = None
    if run.accelerator.is_main_process:
        try:
            _write_checkpoint(run, rescue)
        except OutputError as error:
            failed = error
    run.accelerator.wait_for_everyone()
    if failed:
        raise failed
    return outputs.path_of(run.recipe, run.step) if run.recipe.output else None


def _write_checkpoint(run: Run, rescue: bool) -> Path | None:
    if run.recipe.output is None:
        return None
    state = (run.parameters, run.optimizer, run.loss_scale)
    saved = checkpoint.save(run.recipe, run.record, run.step, *state, rescue)
    run.watch.keep(saved)
    return saved


def _kept(run: Run) -> str:
    """Describe what was saved before a failure, for the error message."""
    newest = outputs.newest(run.recipe)
    return f"; the last good checkpoint is {newest}" if newest else ""


def _file_sha256(example: Example) -> str:
    """Return the SHA-256 of the picture's file as it is now; empty if it is gone. `pixels_sha256` is of what was
    trained on."""
    try:
        return hashlib.sha256(example.source.picture.read_bytes()).hexdigest()
    except OSError:
        return ""


def _provenance(examples: list[Example], loss: float, seconds: float) -> dict[str, Any]:
    """Return the provenance of an adapter beyond its recipe."""
    return {
        "pictures": [
            {"name": e.name, "sha256": _file_sha256(e), "pixels_sha256": e.digest, "caption": e.caption}
            | ({"mask_sha256": e.mask_digest} if e.mask_digest else {})
            for e in examples
            if e.view == PLAIN
        ],
        "last_loss": loss if math.isfinite(loss) else None,
        "seconds": round(seconds, 1),
        "versions": {name: version(name) for name in ("qrlora", "torch", "peft", "diffusers", "transformers")},
    }
