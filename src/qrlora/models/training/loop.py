"""The training loop: one for every method and family, and for one process or several.

Nothing random has a state. The examples, noise and timesteps of step n are drawn from generators seeded by (seed, n) or
(seed, epoch), so a run resumed at any step sees what the uninterrupted run would have seen, and so do several processes
that each take a share of every step: the recipe says what a step is, however many there are.

Several processes are accelerate's (`accelerate launch`, torchrun). Each has the base model, or with `fsdp` a part of
it, and all have the same ΔR, whose gradients are summed once a step. The base needs no wrapper for that, and a ΔR that
no gradient reaches (the text stream of Qwen-Image's last block, whose result is not used) is left alone on each.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import itertools
import logging
import math
import re
import time
from collections import Counter
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch
from accelerate import Accelerator
from jaxtyping import Int
from peft import LoraConfig, PeftConfig
from peft.utils.error import NoMatchingPeftModuleError
from torch import Tensor, nn

from qrlora._files import disk_error
from qrlora._interrupts import deferred
from qrlora.errors import OutputError, QrloraError, RecipeError, TrainingError
from qrlora.method.adapter import Adapter, adapter_from_model, remove_adapters, save_adapter
from qrlora.method.space import coefficients_on, load_space
from qrlora.method.tuner import QRLoraConfig
from qrlora.models.families import ModelFamily, family_of, load_pipeline, size_unit
from qrlora.models.stored import stored_weights
from qrlora.models.training import checkpoint, monitor, outputs, space
from qrlora.models.training.dataset import EncodedDataset, Example, Report, encode, find_pictures, load_examples
from qrlora.models.training.optimizers import evaluated, optimizer_for
from qrlora.models.training.pictures import PLAIN, bucket_sizes, check_resolution
from qrlora.models.training.placement import check_disk, check_fits, encoders_alone, settle
from qrlora.models.training.preservation import Preservation, record
from qrlora.models.training.processes import anywhere, check_divisible, processes_here, share, summed
from qrlora.models.training.recipe import Recipe

T = TypeVar("T")

log = logging.getLogger(__name__)

ADAPTER_NAME = "trained"
LOSS_SCALE = 2.0**16
"""What the loss is multiplied with on a float16 base, whose gradients would vanish between its layers otherwise."""


@dataclass(frozen=True)
class Progress:
    """Progress of a run: steps done of all steps, loss of the last step, seconds left at the pace so far."""

    step: int
    steps: int
    loss: float
    seconds_left: float


class TrainingInterrupted(KeyboardInterrupt):
    """Ctrl-C, SIGTERM or SIGHUP, taken after a whole step. `checkpoint` is what `resume` continues from; None if there
    is no output."""

    def __init__(self, step: int, saved: object):
        self.step, self.checkpoint = step, saved
        super().__init__(f"interrupted after step {step}" + (f"; saved {saved}" if saved else "; nothing saved"))


@dataclass
class Run:
    """All that a step reads or changes. `loss_scale` is a power of two, 1 unless the base is in float16."""

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
) -> Adapter:
    """Train one adapter; write it to `recipe.output` if that is set.

    Under `accelerate launch` every process calls it and returns the adapter; the main process alone writes files and
    reports progress.

    Args:
        recipe: what to do.
        pipe: a loaded base model; it comes back as it was (its denoiser frozen). Without it `recipe.model` is loaded,
            and its encoders leave memory as soon as the pictures and captions are encoded.
        family: of `pipe`, if it is not to be looked up.
        progress: called after every step.
        preparing: called after every picture that was read or encoded before the first step.
        resume: continue from the newest checkpoint beside `recipe.output`, to the same ΔR as an uninterrupted run
            (bit for bit on a CPU).
        restart: give up the checkpoints of an earlier run that lie there, once this one is ready for its first step.
        score: how good the pictures of a sample sheet are. The step that scores best is what is returned and written,
            and training stops after `recipe.patience` sheets without a better one; its provenance says so.

    Raises:
        ModelError, DataError, BasisError, TunerError: the model, the pictures or the basis cannot be used.
        RecipeError: nothing to resume, the checkpoint is of another run or has more steps, checkpoints of an earlier
            run are there, a package is missing, or the processes are too many or too few.
        OutputError: the output cannot be written, or another run is writing it; if its disk fails at the end, it says
            where the adapter is instead.
        TrainingError: the loss or the gradient is no longer finite; says at which step.
        TrainingInterrupted: Ctrl-C, SIGTERM or SIGHUP; a checkpoint was written if there is an output.
    """
    started = time.perf_counter()
    monitor.check(recipe, score)
    accelerator = processes_here(**monitor.trackers(recipe))
    check_divisible(recipe, accelerator.num_processes, accelerator.distributed_type.value, given=pipe is not None)
    report, progress = (preparing, progress) if accelerator.is_main_process else (None, None)
    with outputs.held(recipe, resume, restart) if accelerator.is_main_process else contextlib.nullcontext():
        ready = _prepare(recipe, pipe, family, accelerator, report)
        del pipe  # with it go the encoders, unless it is the caller's
        with adapter_on(ready.denoiser, ready.family, recipe, accelerator) as parameters:
            run = _run(recipe, ready, accelerator, parameters, score)
            if resume:
                run.step, run.loss_scale = checkpoint.load(recipe, run.record, parameters, run.optimizer)
                run.watch.resume(outputs.path_of(recipe, run.step))
            elif restart and accelerator.is_main_process:
                outputs.give_up(recipe)
            if recipe.space and not resume and accelerator.is_main_process:
                space.say_novelty(recipe, ready.denoiser, functools.partial(_losses, recipe, ready))
            return _trained(run, ready.examples, progress, started)


def _trained(run: Run, examples: list[Example], progress: Callable[[Progress], None] | None, started: float) -> Adapter:
    """Train the remaining steps and write the adapter."""
    with run.watch.watching(run), deferred() as interrupted:  # a whole adapter is written whole
        loss = _run_steps(run, interrupted, progress)
        adapter = run.watch.chosen(run, _provenance(examples, loss, time.perf_counter() - started))
        if run.recipe.output and run.accelerator.is_main_process:
            save_adapter(adapter, run.recipe.output, spelling="compact" if adapter.metadata.on_basis else "lora")
    run.accelerator.wait_for_everyone()
    return adapter


Losses = Callable[[int], Iterator[Tensor]]
"""The losses of so many forward passes, differentiable, on the denoiser as it stands: those that training begins with,
at every call the same."""


@dataclass(frozen=True)
class Attached(Generic[T]):
    """Trainable parameters on a denoiser, in float32, by name; and the function that reads the result."""

    parameters: dict[str, nn.Parameter]
    read: Callable[[], T]


def train_attached(
    attach: Callable[[Any, ModelFamily, Recipe, Losses], AbstractContextManager[Attached[T]]],
    recipe: Recipe,
    *,
    pipe: Any,
    family: ModelFamily,
    beside: Sequence[Recipe] = (),
    progress: Callable[[Progress], None] | None = None,
) -> T:
    """The run of `train` with anything in the adapter's place, so that other methods differ from it in nothing else.

    Args:
        attach: puts what trains on the denoiser for the duration of a context, and takes it off again. The last of its
            arguments lets it look at the lesson first.
        recipe: what to do, but for its method; nothing is written.
        pipe, family: as `train`.
        beside: recipes whose pictures and captions are learned from too.
        progress: as `train`.

    Returns what `read` of the attached makes of it after the last step. Errors: as `train`.
    """
    accelerator = processes_here()
    ready = _prepare(recipe, pipe, family, accelerator, None, beside)
    with attach(ready.denoiser, ready.family, recipe, functools.partial(_losses, recipe, ready)) as attached:
        run = _run(recipe, ready, accelerator, attached.parameters, None)
        with deferred() as interrupted:
            _run_steps(run, interrupted, progress)
        with evaluated(run.optimizer):
            return attached.read()


@dataclass
class Prepared:
    """Encoded pictures and prompts, and the parts of the pipeline still needed. `pipe` is None if its work is done."""

    pipe: Any
    family: ModelFamily
    denoiser: Any
    scheduler: Any
    examples: list[Example]
    data: EncodedDataset
    sampler: monitor.Sampler | None


def _prepare(
    recipe: Recipe,
    pipe: Any,
    family: ModelFamily | None,
    accelerator: Accelerator,
    preparing: Report | None,
    beside: Sequence[Recipe] = (),
) -> Prepared:
    """The denoiser where its bases are to be computed, and what the encoders make of pictures and prompts."""
    find_pictures(recipe.images)  # a misspelt path should not cost the loading of a model
    if recipe.space:
        load_space(recipe.space)  # nor should a damaged file
    device, alone = (accelerator.device, True) if pipe is None else (pipe.device, False)
    if pipe is None:
        if accelerator.is_main_process:
            _check_disk(recipe)
        pipe, family = load_pipeline(recipe.model, dtype=getattr(torch, recipe.dtype), device="cpu")
        check_fits(pipe, family, recipe, device, accelerator.num_processes)
    family = family or family_of(pipe)
    family_options(recipe, family)
    examples = [example for one in (recipe, *beside) for example in examples_of(one, pipe, family, preparing)]
    with contextlib.ExitStack() as stack:
        if alone:
            stack.enter_context(encoders_alone(pipe, family, "cpu" if recipe.offload else device))
        stack.enter_context(accelerator.local_main_process_first())  # the others find it in the cache
        data = encode(examples, pipe, family, mask_min_value=recipe.mask_min_value, report=preparing)
        sampler = monitor.Sampler(recipe, pipe, family) if recipe.sample_every else None
    denoiser, scheduler = family.denoiser_of(pipe), family.training_scheduler(pipe)
    if not (recipe.quantize or recipe.fsdp):
        denoiser.to(device)  # where bases are computed faster
    kept = pipe if recipe.preserve else None
    return Prepared(kept, family, denoiser, scheduler, examples, replace(data, device=device), sampler)


def _check_disk(recipe: Recipe) -> None:
    """Raise OutputError if there is no room for what training writes, by the shapes in the model's files."""
    if recipe.output is None:
        return
    try:
        weights, _ = stored_weights(recipe.model, recipe.targets)
    except QrloraError:  # loading the model says it, or can read what this cannot
        return
    check_disk(recipe, weights.shapes.values())


def _run(
    recipe: Recipe,
    ready: Prepared,
    accelerator: Accelerator,
    parameters: dict[str, nn.Parameter],
    score: monitor.Score | None,
) -> Run:
    """The run before its first step, its adapter on the denoiser."""
    recipe = recipe.of_pictures(len({example.digest for example in ready.examples if example.view == PLAIN}))
    device = ready.data.device
    settle(ready.denoiser, recipe, device, parameters.values())
    kept = _base_predictions(recipe, ready.pipe, ready.family, device) if recipe.preserve else None
    ready.pipe = None
    optimizer = optimizer_for(recipe, list(parameters.values()))
    watch = monitor.Monitor(recipe, ready.sampler, score)
    half = next(ready.denoiser.parameters()).dtype == torch.float16
    return Run(
        accelerator, recipe, ready.family, ready.denoiser, ready.scheduler, ready.data, parameters, optimizer, watch,
        kept, loss_scale=LOSS_SCALE if half else 1.0,
    )  # fmt: skip


def _base_predictions(recipe: Recipe, pipe: Any, family: ModelFamily, device: torch.device) -> Preservation:
    """Compute the base model's predictions for the preserved prompts, while the adapter is still zero."""
    pipe.to(device)
    return record(pipe, family, recipe.preserve, recipe.seed, recipe.batch_size)


def examples_of(recipe: Recipe, pipe: Any, family: ModelFamily, report: Report | None = None) -> list[Example]:
    """The recipe's pictures, in sizes that the model takes."""
    resolution, unit, largest = recipe.resolution or family.resolution(pipe), size_unit(pipe), family.largest_side(pipe)
    check_resolution(resolution, unit, largest)
    return load_examples(
        recipe.images,
        recipe.text,
        recipe.trigger,
        resolution,
        sizes=bucket_sizes(resolution, unit, largest) if recipe.buckets else (),
        flip=recipe.flip,
        shift=recipe.shift,
        alpha_mask=recipe.alpha_mask,
        repeats=recipe.num_repeats,
        report=report,
    )


def peft_config(recipe: Recipe, family: ModelFamily) -> PeftConfig:
    """The recipe's method as PEFT is told it."""
    targets = family.targets if recipe.targets is None else recipe.targets
    common: dict[str, Any] = {
        "r": recipe.rank,
        "lora_alpha": recipe.alpha,
        "target_modules": targets if isinstance(targets, str) else list(targets),
    }
    if recipe.method == "lora":
        return LoraConfig(init_lora_weights="gaussian", **common)
    return QRLoraConfig(
        triangular=recipe.triangular,
        columns=recipe.columns if isinstance(recipe.columns, str) else list(recipe.columns),
        basis_rank=recipe.basis_rank,
        train_basis=recipe.train_basis,
        **common,
    )


def family_options(recipe: Recipe, family: ModelFamily) -> tuple[dict[str, float], dict[str, float]]:
    """The recipe's fields that the family's loss takes, and those that its draw of timesteps takes.

    Raises RecipeError for a field that is set and has no meaning for this family.
    """
    given = {n: getattr(recipe, n) for n in ("logit_mean", "logit_std", "min_snr_gamma")}
    given = {name: value for name, value in given.items() if value is not None}
    known = family.loss_options | family.timestep_options
    if unknown := sorted(given.keys() - known):
        raise RecipeError(
            f"the family {family.name} has no {unknown[0]}",
            expected=f"of such fields only {', '.join(sorted(known))}",
            got=f"{unknown[0]} = {given[unknown[0]]}",
            remedy="leave it out of the recipe",
        )
    loss, timesteps = ({n: given[n] for n in given if n in o} for o in (family.loss_options, family.timestep_options))
    return loss, timesteps


@contextlib.contextmanager
def adapter_on(
    denoiser: Any,
    family: ModelFamily,
    recipe: Recipe,
    accelerator: Accelerator | None = None,
    config: PeftConfig | None = None,
) -> Iterator[dict[str, nn.Parameter]]:
    """A fresh adapter on the frozen denoiser, for the duration; yields what trains, in float32, by name.

    config: what PEFT is told instead of the recipe's method.
    """
    denoiser.requires_grad_(False)
    config = config or peft_config(recipe, family)
    checkpointing = denoiser.is_gradient_checkpointing
    if recipe.gradient_checkpointing:
        denoiser.enable_gradient_checkpointing()
    try:
        # The first process computes the bases, the others find them in the cache.
        first = accelerator.local_main_process_first() if accelerator else contextlib.nullcontext()
        with first, torch.random.fork_rng(devices=[]):
            torch.manual_seed(recipe.seed)
            try:
                denoiser.add_adapter(config, adapter_name=ADAPTER_NAME)
            except (NoMatchingPeftModuleError, re.error) as error:  # plain LoRA's own way of saying it
                raise RecipeError(
                    "targets match no layer of the denoiser",
                    expected="module names such as to_q,to_k, or one regular expression for whole names",
                    got=f"{recipe.targets!r} ({error})",
                    remedy="leave targets out to adapt what the family adapts by default",
                ) from error
        space.place(denoiser, recipe, ADAPTER_NAME)
        parameters = {name: p for name, p in denoiser.named_parameters() if p.requires_grad}
        for parameter in parameters.values():
            parameter.data = parameter.data.float()
        yield parameters
    finally:
        remove_adapters(denoiser, [ADAPTER_NAME])
        if not checkpointing:
            denoiser.disable_gradient_checkpointing()


def _run_steps(run: Run, interrupted: Callable[[], bool], progress: Callable[[Progress], None] | None) -> float:
    """Every remaining step, with checkpoints; returns the last loss."""
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
    """What to say of a run that ends because something beside it cannot be written; it has been saved. Only the main
    process writes, so only it comes here, and does not wait for the others."""
    said, saved = disk_error(error), _write_checkpoint(run, rescue=True)
    then = f"{said.remedy}; then continue from {saved} with --resume" if saved else said.remedy
    return OutputError(f"training stopped after step {run.step}: {said.what}", got=said.got, remedy=then)


def _step(run: Run) -> tuple[float, float]:
    """One optimiser step; returns its mean loss and gradient norm, unclipped. It changes nothing if it raises."""
    for group in run.optimizer.param_groups:
        group["lr"] = run.recipe.learning_rate * pace(run.recipe, run.step)
    while True:
        total, norm = _gradients(run)
        if math.isfinite(norm) and math.isfinite(total):
            break
        run.optimizer.zero_grad()
        if run.loss_scale == 1 or not math.isfinite(total):
            raise TrainingError(
                f"training broke down at step {run.step + 1}",
                expected="a finite loss and gradient",
                got=f"loss {total}, gradient norm {norm}",
                remedy="lower learning_rate, or train in float32" + _kept(run),
            )
        run.loss_scale /= 2  # float16 overflowed on the way back: the same step again
    run.optimizer.step()
    run.optimizer.zero_grad()
    return total, norm


def _gradients(run: Run) -> tuple[float, float]:
    """Put the step's gradients, of all processes together, in place; returns its mean loss and their norm unclipped."""
    recipe, accelerator = run.recipe, run.accelerator
    options, total = family_options(recipe, run.family)[0], 0.0
    generator = torch.Generator().manual_seed(_mix(-1 - recipe.seed, run.step))
    drawn = draw(recipe, run.family, run.scheduler, run.data, run.step)
    for micro, (latents, noise, timesteps, conditions, mask) in enumerate(drawn):
        call = run.kept.draw(generator) if run.kept else None
        rows = share(recipe, micro, accelerator.process_index, accelerator.num_processes)
        if rows.start == rows.stop:
            continue
        taken = [latents[rows], noise[rows], timesteps[rows], {key: value[rows] for key, value in conditions.items()}]
        taken.append(None if mask is None else mask[rows])
        loss = run.family.loss(run.denoiser, run.scheduler, *taken, **options)
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
    """The share of the learning rate that step ``step`` (from 0) is taken at: it rises, holds and falls linearly."""
    rising = (step + 1) / max(1, recipe.warmup_steps)
    falling = (recipe.steps - step) / max(1, recipe.cooldown_steps)
    return min(1.0, rising, falling)


def _losses(recipe: Recipe, ready: Prepared, count: int) -> Iterator[Tensor]:
    """As `Losses`."""
    options, most = family_options(recipe, ready.family)[0], math.ceil(count / recipe.accumulation)
    steps = (draw(recipe, ready.family, ready.scheduler, ready.data, step) for step in range(most))
    for drawn in itertools.islice(itertools.chain.from_iterable(steps), count):
        yield ready.family.loss(ready.denoiser, ready.scheduler, *drawn, **options)


def draw(
    recipe: Recipe, family: ModelFamily, scheduler: Any, data: EncodedDataset, step: int
) -> Iterator[tuple[Tensor, Tensor, Tensor, dict[str, Tensor], Tensor | None]]:
    """Latents, noise, timesteps, conditions and mask of every forward pass of a step, counted from 0."""
    generator = torch.Generator().manual_seed(_mix(recipe.seed, step))
    options, buckets = family_options(recipe, family)[1], data.buckets
    for micro in range(recipe.accumulation):
        number = step * recipe.accumulation + micro
        examples = data.epoch[order(recipe.seed, buckets, recipe.batch_size, number)]
        latents, conditions = data.batch(examples)
        noise = torch.randn(latents.shape, generator=generator)
        timesteps = family.sample_timesteps(scheduler, len(latents), generator, **options)
        yield latents, noise.to(data.device), timesteps.to(data.device), conditions, data.mask(examples)


def order(seed: int, buckets: Sequence[Hashable], size: int, number: int) -> Int[Tensor, " size"]:
    """Return the entries of batch ``number`` (from 0), all of one bucket. A function of its arguments alone.

    Every epoch goes through all entries once, in an order of its own. A batch is made when a bucket has ``size`` of
    them waiting; those that wait at the end of an epoch are the first of their bucket's next batch. So no batch is
    smaller than the others, no entry is left out, and with one bucket the batches are the epochs, cut into equal parts.

    Args:
        seed: of the orders.
        buckets: the bucket of each entry.
    """
    counts = Counter(buckets)

    def made(epochs: int) -> int:
        return sum(epochs * count // size for count in counts.values())

    def shuffled(epoch: int) -> list[int]:
        generator = torch.Generator().manual_seed(_mix(seed, -1 - epoch))
        return torch.randperm(len(buckets), generator=generator).tolist()

    epoch = number * size // len(buckets)  # not yet too late; some wait, so perhaps too early
    while made(epoch + 1) <= number:
        epoch += 1
    waiting = Counter({bucket: epoch * count % size for bucket, count in counts.items()})
    left, passed = number - made(epoch), list[int]()
    for entry in shuffled(epoch):
        passed.append(entry)
        waiting[buckets[entry]] += 1
        if waiting[buckets[entry]] == size:
            waiting[buckets[entry]], left = 0, left - 1
            if left < 0:
                break
    bucket = buckets[passed[-1]]
    batch = [entry for entry in passed if buckets[entry] == bucket]
    while len(batch) < size:
        epoch -= 1
        batch = [entry for entry in shuffled(epoch) if buckets[entry] == bucket] + batch
    return torch.tensor(batch[-size:])


def _mix(seed: int, counter: int) -> int:
    """One generator seed from two numbers, far apart for neighbours (the finaliser of splitmix64)."""
    z = (seed * 0x9E3779B97F4A7C15 + counter * 0xD1B54A32D192ED03) & (2**64 - 1)
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & (2**64 - 1)
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & (2**64 - 1)
    return (z ^ (z >> 31)) & (2**63 - 1)


def _save_checkpoint(run: Run, rescue: bool = True) -> Path | None:
    """Written by the main process alone, and there when any process goes on."""
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
    """SHA-256 of the picture's file as it is now; empty if it is gone. `pixels_sha256` is of what was trained on."""
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
