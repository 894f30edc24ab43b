"""Generate pictures from prompts, seeds and weighted adapters.

    pipe, family = load_pipeline("pico")
    generate(pipe, family, ["a photo of a <c> mug"], seeds=[0, 1], adapters=[(mug, 0.9)])

A picture depends on its prompt, its seed, the steps, the guidance and the adapters, not on what else is in its batch.
"""

from __future__ import annotations

import contextlib
import itertools
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from qrlora._said import joined, said
from qrlora._tensor_file import note
from qrlora.errors import DataError, MismatchError, PictureError
from qrlora.method.adapter import Adapter, attach, remove_adapters
from qrlora.method.composition import Composition, Live, project_out
from qrlora.method.composition.parts import check_weights, on_one_basis
from qrlora.models.families import ModelFamily, size_unit
from qrlora.models.request import Request

WeightedAdapter = tuple[Adapter, float]
OnStep = Callable[[int, int], None]
Sample = tuple[tuple[float, ...], str, int]
"""Weights, prompt, seed."""
Sampler = Callable[[Sequence[Sample]], list[Image.Image]]
SMALLEST_CELL = 96
"""Side in pixels under which a grid's pictures are enlarged, so that labels have room."""


def generate(
    pipe: Any,
    family: ModelFamily,
    prompts: Sequence[str],
    seeds: Sequence[int],
    *,
    adapters: Sequence[WeightedAdapter] = (),
    steps: int | None = None,
    guidance: float | None = None,
    resolution: int | None = None,
    batch_size: int = 8,
    progress: Callable[[int, int], None] | None = None,
) -> list[Image.Image]:
    """Generate one picture per prompt and seed: all seeds of the first prompt, then of the second, and so on.

    Args:
        pipe: a pipeline of `family`; it comes back without the adapters.
        adapters: with their weights. Those of one basis are composed first, and so cost what one costs.
        steps: denoising steps; the family's default if None.
        guidance: classifier-free guidance scale; the family's default if None.
        resolution: side of the pictures in pixels; the model's own if None.
        batch_size: pictures made at once.
        progress: called with pictures done and pictures in all.

    Raises:
        MismatchError: an adapter does not belong to this model.
        DataError: a prompt is longer than the model reads, or the model makes no pictures of that size.
        PictureError: pictures whose numbers are not finite; it holds the others.
    """
    jobs = [(prompt, seed) for prompt in prompts for seed in seeds]
    options: dict[str, Any] = {"steps": steps, "guidance": guidance, "resolution": resolution}
    return generate_jobs(pipe, family, jobs, adapters=adapters, batch_size=batch_size, progress=progress, **options)


def generate_jobs(
    pipe: Any,
    family: ModelFamily,
    jobs: Sequence[tuple[str, int]],
    *,
    adapters: Sequence[WeightedAdapter] = (),
    steps: int | None = None,
    guidance: float | None = None,
    resolution: int | None = None,
    batch_size: int = 8,
    progress: Callable[[int, int], None] | None = None,
) -> list[Image.Image]:
    """Generate one picture per (prompt, seed) pair, in their order. Arguments and errors: as `generate`."""
    images: list[Image.Image | None] = []
    with attached(pipe, family, _as_one(adapters)):
        for start in range(0, len(jobs), batch_size):
            images += _batch(pipe, family, jobs[start : start + batch_size], steps, guidance, resolution)
            if progress:
                progress(len(images), len(jobs))
    return _whole(images, jobs)


def weight_grid(
    pipe: Any,
    family: ModelFamily,
    prompt: str,
    rows: Adapter,
    columns: Adapter,
    *,
    row_weights: Sequence[float],
    column_weights: Sequence[float],
    null_space: float = 0.0,
    seed: int = 0,
    steps: int | None = None,
    guidance: float | None = None,
    resolution: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Image.Image:
    """Generate one labelled picture: a prompt and seed at every pair of weights of two adapters. Errors: as `generate`.

    null_space: strength of their null-space projection, applied where neither weight is 0.
    """
    for adapter, weights in ((rows, row_weights), (columns, column_weights)):
        check_weights([(adapter, weight) for weight in weights])
    options: dict[str, Any] = {"steps": steps, "guidance": guidance, "resolution": resolution}
    cells: list[list[Image.Image]] = []
    adapters = {"rows": rows, "columns": columns}
    with weight_sampler(pipe, family, adapters, null_space=null_space, **options) as sampler:
        for row_weight in row_weights:
            cells.append(sampler([((row_weight, weight), prompt, seed) for weight in column_weights]))
            if progress:
                progress(len(cells) * len(column_weights), len(row_weights) * len(column_weights))
    row_name, column_name = _labels(rows, columns)
    return labelled_grid(
        cells,
        [f"{row_name} {weight:g}" for weight in row_weights],
        [f"{column_name} {weight:g}" for weight in column_weights],
        title=f"{prompt}   (seed {seed})",
    )


def generate_mixed(
    pipe: Any,
    family: ModelFamily,
    requests: Sequence[Request],
    live: Live,
    *,
    steps: int | None = None,
    guidance: float | None = None,
    resolution: int | None = None,
    batch_size: int = 8,
    on_step: OnStep | None = None,
) -> list[Image.Image]:
    """Generate one picture per request, in their order; a batch holds different compositions.

    Each is the picture that `generate` makes alone with the same adapters and weights, up to rounding: one level of 255
    in float32.

    Args:
        live: the adapters, on the denoiser of `pipe`; it is left with the last batch's compositions.
        on_step: called after every denoising step of a batch with steps done and steps in all; what it raises ends it.

    Raises:
        MismatchError: `live` is on another denoiser, a request names an adapter that it lacks, or a weight that is no
            finite number, or a strength that is not from 0 to 1.
        DataError, PictureError: as `generate`. One request's numbers never reach another's picture.
    """
    if live.denoiser is not family.denoiser_of(pipe):
        remedy = "make it of the denoiser that is to make the pictures"
        raise MismatchError("live compositions of another denoiser", expected="this pipeline's", remedy=remedy)
    images: list[Image.Image | None] = []
    jobs = [(request.prompt, request.seed) for request in requests]
    for start in range(0, len(requests), batch_size):
        batch = requests[start : start + batch_size]
        rows = [(request.composition, request.null_space) for request in batch]
        compositions, strengths = zip(*(rows[:1] if all(row == rows[0] for row in rows) else rows), strict=True)
        live.compose(compositions, strengths)
        images += _batch(pipe, family, jobs[start : start + batch_size], steps, guidance, resolution, on_step)
    return _whole(images, jobs)


@contextlib.contextmanager
def weight_sampler(
    pipe: Any,
    family: ModelFamily,
    adapters: Mapping[str, Adapter],
    *,
    null_space: float = 0.0,
    batch_size: int = 8,
    **sampling: Any,
) -> Iterator[Sampler]:
    """Yield a function that samples at any weights of these adapters, given in their order; valid inside the context.

    On one basis a batch mixes weights, and changing them is free (composition.Live); other adapters are attached again
    for each change of weights. null_space: strength of the projection. sampling: steps, guidance, resolution, as for
    `generate`.
    """
    if on_one_basis(list(adapters.values())):
        with Live(family.denoiser_of(pipe), adapters) as live:

            def mixed(samples: Sequence[Sample]) -> list[Image.Image]:
                requests = [
                    Request(p, s, dict(zip(adapters, weights, strict=True)), null_space) for weights, p, s in samples
                ]
                return generate_mixed(pipe, family, requests, live, batch_size=batch_size, **sampling)

            yield mixed
        return

    def one_by_one(samples: Sequence[Sample]) -> list[Image.Image]:
        images: list[Image.Image] = []
        for weights, same in itertools.groupby(samples, key=lambda sample: sample[0]):
            projected = project_out(list(zip(adapters.values(), weights, strict=True)), null_space)
            jobs = [(prompt, seed) for _, prompt, seed in same]
            images += generate_jobs(pipe, family, jobs, adapters=projected, batch_size=batch_size, **sampling)
        return images

    yield one_by_one


@contextlib.contextmanager
def attached(pipe: Any, family: ModelFamily, adapters: Sequence[WeightedAdapter]) -> Iterator[list[str]]:
    """Attach these adapters at these weights for the duration; yield their names in the denoiser.

    Raises:
        MismatchError: an adapter does not belong to this model, or a weight is no finite number.
    """
    if adapters:
        check_weights(adapters)
    denoiser: Any = family.denoiser_of(pipe)
    names = [f"part{index}" for index in range(len(adapters))]
    try:
        with warnings.catch_warnings():
            # Several adapters at once are what is asked for here.
            warnings.filterwarnings("ignore", "Already found a `peft_config`")
            named = zip(names, (adapter for adapter, _ in adapters), strict=True)
            # Those on a basis first: a QR-LoRA layer cannot be put around a plain LoRA.
            for name, adapter in sorted(named, key=lambda one: not one[1].metadata.on_basis):
                attach(denoiser, adapter, name)
        if names:
            denoiser.set_adapters(names, [weight for _, weight in adapters])
        yield names
    finally:
        remove_adapters(denoiser, names)


def _as_one(adapters: Sequence[WeightedAdapter]) -> list[WeightedAdapter]:
    """Adapters of one basis as their composition; others (plain LoRA, other bases) side by side, the same sum at the
    cost of each."""
    together = len(adapters) > 1 and on_one_basis([adapter for adapter, _ in adapters])
    return [(Composition(adapters).adapter(), 1.0)] if together else list(adapters)


def one_batch(
    pipe: Any,
    family: ModelFamily,
    jobs: Sequence[tuple[str, int]],
    steps: int | None = None,
    guidance: float | None = None,
    resolution: int | None = None,
    on_step: OnStep | None = None,
) -> list[Image.Image]:
    """Generate the pictures of these (prompt, seed) pairs in one call of the pipeline as it stands.

    `on_step` and errors: as `generate_mixed`.
    """
    return _whole(_batch(pipe, family, jobs, steps, guidance, resolution, on_step), jobs)


def _batch(
    pipe: Any,
    family: ModelFamily,
    jobs: Sequence[tuple[str, int]],
    steps: int | None = None,
    guidance: float | None = None,
    resolution: int | None = None,
    on_step: OnStep | None = None,
) -> list[Image.Image | None]:
    """Generate as `one_batch` does, with None for a picture whose latents or pixels are not finite."""
    prompts = [prompt for prompt, _ in jobs]
    own, unit = family.resolution(pipe), size_unit(pipe)
    side = own if resolution is None else resolution
    own_steps, own_guidance = family.sampling(pipe)
    options = family.prompt_options(pipe, prompts)
    options[family.guidance_argument] = own_guidance if guidance is None else guidance
    watch = _Watch(on_step)
    try:
        if side % unit:  # FLUX's pipeline would make pictures of another size, and say so in a log only
            raise ValueError(f"{side} is no multiple of {unit}")
        pixels = pipe(
            prompt=prompts,
            generator=[torch.Generator().manual_seed(seed) for _, seed in jobs],
            num_inference_steps=own_steps if steps is None else steps,
            height=side,
            width=side,
            callback_on_step_end=watch,
            output_type="np",
            **options,
        ).images
    except ValueError as error:
        if resolution is None:
            raise
        expected = f"a multiple of {unit} pixels; {own} is its own"
        raise DataError("this model makes no pictures of that size", expected=expected, got=error) from error
    finite = [bool(latents and np.isfinite(one).all()) for latents, one in zip(watch.finite, pixels, strict=True)]
    return [pipe.image_processor.numpy_to_pil(one)[0] if ok else None for one, ok in zip(pixels, finite, strict=True)]


class _Watch:
    """Callback of diffusers after each step: it records whether each picture's latents are finite."""

    def __init__(self, on_step: OnStep | None):
        self._on_step = on_step
        self.finite: list[bool] = []

    def __call__(self, pipe: Any, step: int, _: Any, tensors: Mapping[str, torch.Tensor]) -> dict[str, Any]:
        if step + 1 == pipe.num_timesteps:  # what was not finite once stays so
            self.finite = torch.isfinite(tensors["latents"].flatten(1)).all(1).tolist()
        if self._on_step:
            self._on_step(step + 1, pipe.num_timesteps)
        return {}


def not_finite(jobs: Sequence[tuple[str, int]], images: Sequence[Image.Image | None] = ()) -> PictureError:
    """Return the error about these (prompt, seed) pairs; `images` are all of the call."""
    return PictureError(
        said("%(count)s pictures came out as NaN or Inf, and would have been black", count=len(jobs)),
        expected="finite numbers",
        got=joined(said("%(prompt)s with seed %(seed)s", prompt=repr(prompt), seed=seed) for prompt, seed in jobs),
        remedy="lower the adapters' weights or the guidance; a model in float16 may need bfloat16 or float32 (dtype)",
        images=images,
    )


def or_black(make: Callable[[], list[Image.Image]]) -> list[Image.Image]:
    """Return the pictures that a call makes, black in place of those that are not finite, with a note.

    For sample sheets of a longer run, which one such picture must not abort."""
    try:
        return make()
    except PictureError as error:
        note(str(error))
        size = next((image.size for image in error.images if image is not None), (SMALLEST_CELL, SMALLEST_CELL))
        return [Image.new("RGB", size) if image is None else image for image in error.images]


def _whole(images: Sequence[Image.Image | None], jobs: Sequence[tuple[str, int]]) -> list[Image.Image]:
    """The pictures, if all of them are there."""
    failed = [job for job, image in zip(jobs, images, strict=True) if image is None]
    if failed:
        raise not_finite(failed, images)
    return [image for image in images if image is not None]


def _labels(rows: Adapter, columns: Adapter) -> tuple[str, str]:
    """Return labels that tell two adapters apart: their roles, else their names."""
    if rows.metadata.role != columns.metadata.role:
        return rows.metadata.role or rows.name or "rows", columns.metadata.role or columns.name or "columns"
    return (rows.name, columns.name) if rows.name != columns.name else ("rows", "columns")


def labelled_grid(
    cells: Sequence[Sequence[Image.Image]],
    row_labels: Sequence[str],
    column_labels: Sequence[str],
    title: str = "",
) -> Image.Image:
    """Arrange pictures of one size in rows, with a label left of each row (which may have several lines) and above each
    column, and a title above all."""
    enlarge = max(1, -(-SMALLEST_CELL // cells[0][0].width))
    width, height = cells[0][0].width * enlarge, cells[0][0].height * enlarge
    size = max(13, width // 10)
    font = ImageFont.load_default(size)
    gap = max(4, width // 32)
    line = round(size * 1.4)
    widest = max(font.getlength(part) for label in row_labels for part in label.split("\n"))
    left = round(widest) + 2 * gap
    cell_width = max([width] + [round(font.getlength(label)) for label in column_labels]) + gap
    top = (2 if title else 1) * line + gap
    whole = max(left + cell_width * len(column_labels), round(font.getlength(title)) + 2 * gap)
    sheet = Image.new("RGB", (whole, top + (height + gap) * len(row_labels)), "white")
    draw = ImageDraw.Draw(sheet)
    draw.text((gap, gap), title, fill="black", font=font)
    for column, label in enumerate(column_labels):
        middle = left + column * cell_width + width / 2
        draw.text((middle, top - gap), label, fill="black", font=font, anchor="ms")
    for row, label in enumerate(row_labels):
        y = top + row * (height + gap)
        draw.text((left - gap, y + height / 2), label, fill="black", font=font, anchor="rm", align="right")
        for column, cell in enumerate(cells[row]):
            enlarged = cell.resize((width, height), Image.Resampling.NEAREST)
            sheet.paste(enlarged, (left + column * cell_width, y))
    return sheet
