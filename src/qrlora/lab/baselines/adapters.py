"""Every training method that the lab compares, run by the package's one training loop.

A method is how something that trains is put on a denoiser, and how ΔW is read off it afterwards. Data, noise,
timesteps, optimiser, clipping and cooldown are the loop's, and the same for all. PEFT's own classes are used where it
has them.

ΔW is what the weights became less what they were before the method touched them: PiSSA and OLoRA take their start out
of the base weight, and what that leaves behind by rounding is no part of what was learned.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from peft import LoraConfig, OFTConfig, PeftConfig
from peft.tuners.lora import LoraLayer
from peft.tuners.oft import OFTLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from qrlora.errors import RecipeError
from qrlora.lab.baselines.deltas import Delta, Learned
from qrlora.lab.baselines.directions import Directions, activation, base_of, positive_qr
from qrlora.lab.baselines.training import Attached, train_attached
from qrlora.lab.tasks import RECIPES
from qrlora.method.basis import clipping
from qrlora.method.tuner import QRLoraConfig, QRLoraLayer
from qrlora.method.tuner.factors import BasisColumns
from qrlora.models.families import ModelFamily
from qrlora.models.training.attach import ADAPTER_NAME, adapter_on, peft_config
from qrlora.models.training.prepare import Losses
from qrlora.models.training.recipe import Recipe

Attach = Callable[[Any, ModelFamily, Recipe, Losses], AbstractContextManager[Attached[Learned]]]
Config = Callable[[Recipe, dict[str, Any]], PeftConfig]
Prepare = Callable[[Mapping[str, Any], Recipe], None]
"""Given the adapter layers by name, and the recipe: changes them before the first step."""


@dataclass(frozen=True)
class AdapterMethod:
    """A training method of the comparison: its name, a description, its source, and how it is attached to a denoiser.

    version: raised whenever the same recipe would train another ΔW than before, so that old results are not reused.
    """

    name: str
    about: str
    source: str
    attach: Attach
    version: int = 1


@dataclass(frozen=True)
class TrainingResult:
    """Result of one run: ΔW, number of trained parameters (zeros of a triangle not counted), loss of every step."""

    learned: Learned
    trained: int
    losses: tuple[float, ...]


def train_method(
    method: str, recipe: Recipe, *, pipe: Any, family: ModelFamily, beside: Sequence[Recipe] = ()
) -> TrainingResult:
    """Train a method of ADAPTERS for the recipe's steps; `pipe` comes back bit for bit as it was.

    The recipe's own method, and fields that the method decides (columns where all own the first, triangular,
    train_basis), have no effect; its output is not written. Raises RecipeError for an unknown method; else as `train`.

    beside: recipes whose pictures and captions are trained on too, all else being the first recipe's. With one of them
    half of each batch is of either picture, so each is seen as often as alone only in twice the steps.
    """
    if method not in ADAPTERS:
        raise RecipeError(f"no adapter method {method!r}", expected=", ".join(ADAPTERS), got=method)
    losses: list[float] = []
    counted: list[int] = []

    @contextlib.contextmanager
    def attach(denoiser: Any, family: ModelFamily, recipe: Recipe, losses: Losses) -> Iterator[Attached[Learned]]:
        with ADAPTERS[method].attach(denoiser, family, recipe, losses) as attached:
            counted.append(_trained(denoiser, attached.parameters))
            yield attached

    recipe = recipe.replace(output=None, sample_every=0, checkpoint_every=0, log_with="none")
    learned = train_attached(
        attach, recipe, pipe=pipe, family=family, beside=beside, progress=lambda done: losses.append(done.loss)
    )
    return TrainingResult(learned, counted[0], tuple(losses))


def _trained(denoiser: nn.Module, parameters: Mapping[str, nn.Parameter]) -> int:
    ours = [layer for layer in denoiser.modules() if isinstance(layer, QRLoraLayer)]
    masks = [layer.delta(ADAPTER_NAME).outside for layer in ours]
    outside = sum(int(mask.sum()) for mask in masks if mask is not None)
    return sum(parameter.numel() for parameter in parameters.values()) - outside


def _by_peft(config: Config, prepare: Prepare | None = None) -> Attach:
    """Return the attach function of a method of PEFT or of this package, from its configuration and a function that
    prepares its layers."""

    @contextlib.contextmanager
    def attach(denoiser: Any, family: ModelFamily, recipe: Recipe, _: Losses) -> Iterator[Attached[Learned]]:
        targets = family.targets if recipe.targets is None else recipe.targets
        common: dict[str, Any] = {"target_modules": targets if isinstance(targets, str) else list(targets)}
        before = {name: tensor.detach().clone() for name, tensor in denoiser.named_parameters()}
        try:
            with adapter_on(denoiser, family, recipe, config=config(recipe, common)):
                layers = {n: m for n, m in denoiser.named_modules() if isinstance(m, BaseTunerLayer)}
                if prepare:
                    _check_not_clipped(layers)
                    prepare(layers, recipe)
                for name, parameter in denoiser.named_parameters():
                    if ".lora_" in name:  # a frozen factor has to have the dtype of the one that trains
                        parameter.data = parameter.data.float()
                moving = {name: parameter for name, parameter in denoiser.named_parameters() if parameter.requires_grad}
                start = {n: _factors(m) for n, m in layers.items() if _begins_in_the_base(m)}
                yield Attached(moving, functools.partial(_read, layers, start))
        finally:
            _restore(denoiser, before)

    return attach


def _check_not_clipped(layers: Mapping[str, Any]) -> None:
    """RecipeError if a layer holds fewer columns than were asked for: these methods change Q or its rows."""
    ours = {name: layer for name, layer in layers.items() if isinstance(layer, QRLoraLayer)}
    columns = {n: (len(layer.own_adapters()[ADAPTER_NAME].columns), layer.r[ADAPTER_NAME]) for n, layer in ours.items()}
    if clipped := clipping(columns):
        raise RecipeError(
            "a rank that not all layers hold, which this method needs",
            expected="as many columns in every target",
            got=clipped,
            remedy="lower the rank, or leave these layers out of the targets",
        )


def _by_recipe(name: str) -> Attach:
    """Return the attach function of a method of `tasks.RECIPES`."""

    @contextlib.contextmanager
    def attach(denoiser: Any, family: ModelFamily, recipe: Recipe, losses: Losses) -> Iterator[Attached[Learned]]:
        by = recipe.replace(**RECIPES[name])
        with _by_peft(lambda *_: peft_config(by, family))(denoiser, family, by, losses) as attached:
            yield attached

    return attach


def _on_directions(directions: Directions) -> Attach:
    """A dense ΔR on a frozen Q of other directions than the basis has. Layers that get none keep the basis's Q."""

    @contextlib.contextmanager
    def attach(denoiser: Any, family: ModelFamily, recipe: Recipe, losses: Losses) -> Iterator[Attached[Learned]]:
        def put(layers: Mapping[str, Any], recipe: Recipe) -> None:
            for name, q in directions(layers, recipe.rank, losses).items():
                _set_columns(layers[name], q)

        with _by_peft(_dense, put)(denoiser, family, recipe, losses) as attached:
            yield attached

    return attach


def _lora(init: bool | str) -> Config:
    def config(recipe: Recipe, common: dict[str, Any]) -> PeftConfig:
        return LoraConfig(init_lora_weights=init, r=recipe.rank, lora_alpha=recipe.alpha, **common)  # type: ignore[arg-type]

    return config


def _oft(recipe: Recipe, common: dict[str, Any]) -> PeftConfig:
    """Blocks of 2 r: (b - 1) / 2 numbers for each input, so about r · in of them, as many as ΔR has."""
    return OFTConfig(oft_block_size=2 * recipe.rank, use_cayley_neumann=False, **common)


def _dense(recipe: Recipe, common: dict[str, Any]) -> PeftConfig:
    return QRLoraConfig(r=recipe.rank, lora_alpha=recipe.alpha, triangular=False, **common)


def _triangular(width: int = 1) -> Config:
    """The published form on the first r of `width` · r columns of a basis."""

    def config(recipe: Recipe, common: dict[str, Any]) -> PeftConfig:
        wide: dict[str, Any] = {"columns": "first", "basis_rank": width * recipe.rank}
        return QRLoraConfig(r=recipe.rank, lora_alpha=recipe.alpha, triangular=True, **wide, **common)

    return config


@contextlib.contextmanager
def _full(denoiser: Any, family: ModelFamily, recipe: Recipe, _: Losses) -> Iterator[Attached[Learned]]:
    """The target matrices themselves train; biases do not, since no adapter has any."""
    denoiser.requires_grad_(False)
    targets = family.targets if recipe.targets is None else recipe.targets
    named: list[tuple[str, Any]] = [(n, m) for n, m in denoiser.named_modules() if isinstance(m, nn.Linear)]
    chosen: dict[str, nn.Parameter] = {name: module.weight for name, module in named if is_target(name, targets)}
    if not chosen:
        raise RecipeError("targets match no layer of the denoiser", expected="names of its linear layers", got=targets)
    before = {f"{name}.weight": weight.detach().clone() for name, weight in chosen.items()}
    for weight in chosen.values():
        weight.data = weight.data.float()
        weight.requires_grad_(True)

    def read() -> Learned:
        now = {name: weight.detach().float() for name, weight in chosen.items()}
        return {n: Delta(matrix=(w - before[f"{n}.weight"].float()).cpu()) for n, w in now.items()}

    try:
        yield Attached({f"{name}.weight": weight for name, weight in chosen.items()}, read)
    finally:
        denoiser.requires_grad_(False)
        _restore(denoiser, before)


def is_target(name: str, targets: str | Sequence[str]) -> bool:
    """Return True if PEFT would adapt the layer of this name: a pattern matches whole names, a list their ends."""
    if isinstance(targets, str):
        return re.fullmatch(targets, name) is not None
    return any(name == target or name.endswith(f".{target}") for target in targets)


@torch.no_grad()
def _restore(denoiser: nn.Module, before: Mapping[str, Tensor]) -> None:
    """Put kept copies back where the values differ in any bit."""
    for name, parameter in denoiser.named_parameters():
        parameter.grad = None
        if name in before and (parameter.dtype != before[name].dtype or not torch.equal(parameter, before[name])):
            parameter.data = before[name]


def _begins_in_the_base(layer: Any) -> bool:
    """Return True if an untrained adapter is not zero, because as much was taken out of the base weight."""
    stock = isinstance(layer, LoraLayer) and not isinstance(layer, QRLoraLayer)
    return stock and all(bool(part[ADAPTER_NAME].weight.any()) for part in (layer.lora_A, layer.lora_B))


@torch.no_grad()
def _factors(layer: Any) -> tuple[Float[Tensor, "out rank"], Float[Tensor, "rank in"]]:
    """up and s · down of an adapter layer as it is now, copied to the CPU."""
    down, up = layer.lora_A[ADAPTER_NAME], layer.lora_B[ADAPTER_NAME]
    ours = isinstance(layer, QRLoraLayer)
    pair = (up.up(), down.down()) if ours else (up.weight.flatten(1), down.weight.flatten(1))
    return pair[0].cpu().float().clone(), layer.scaling[ADAPTER_NAME] * pair[1].cpu().float()


@torch.no_grad()
def _read(layers: Mapping[str, Any], start: Mapping[str, tuple[Tensor, Tensor]]) -> Learned:
    """Return ΔW of every adapter layer: s B A - s B₀ A₀ where the start was taken out of the base, W Rᵀ - W for OFT."""
    learned = {}
    for name, layer in layers.items():
        if isinstance(layer, OFTLayer):
            learned[name] = _rotation(layer)
            continue
        up, down = _factors(layer)
        if name in start:
            up, down = torch.cat([up, start[name][0]], dim=1), torch.cat([down, -start[name][1]])
        learned[name] = Delta(up, down)
    return learned


def _rotation(layer: Any) -> Delta:
    """Return ΔW of an OFT layer, which gives its base layer the inputs x R."""
    weight: Tensor = layer.get_base_layer().weight.detach().float()
    turned = layer.oft_R[ADAPTER_NAME](torch.eye(weight.shape[1], device=weight.device))
    return Delta(matrix=(weight @ turned.T - weight).cpu())


@torch.no_grad()
def _set_columns(layer: Any, q: Float[Tensor, "out rank"]) -> None:
    """Replace the columns of Q that an adapter layer of ours uses."""
    layer.lora_B[ADAPTER_NAME].basis.q.copy_(q)


def _random(layers: Mapping[str, Any], recipe: Recipe) -> None:
    for name, layer in layers.items():
        _set_columns(layer, orthonormal(len(base_of(layer)), recipe.rank, f"all {name}"))


def orthonormal(size: int, count: int, seed: str) -> Float[Tensor, "size count"]:
    """Random orthonormal columns (uniformly distributed ones, by QR with positive pivots), a function of the seed."""
    generator = torch.Generator().manual_seed(int.from_bytes(hashlib.sha256(seed.encode()).digest()[:7], "big"))
    return positive_qr(torch.randn(size, count, generator=generator, dtype=torch.float64)).float()


class RotatedColumns(BasisColumns):
    """Q turned out of its own span: Q' = [Q P] C with P the next r columns of the basis, `turn` (r, r) trained.

    C is the first r columns of the Cayley transform (1 - A)⁻¹ (1 + A) of A = [[0, -Kᵀ], [K, 0]] with K = turn / 2, so
    Q'ᵀQ' = 1 whatever trains. A rotation Q' = Q C within the span would be none: Q C (R + ΔR) is Q (R + ΔR') for a
    dense ΔR' = C (R + ΔR) - R, which ΔR reaches alone. This A has no such part to first order. ΔW = Q ΔR + (Q' - Q)
    (R + ΔR), exactly zero at the start.
    """

    def __init__(self, basis: Any, columns: tuple[int, ...], kernel_dims: int, turn: Float[Tensor, "rank rank"]):
        super().__init__(basis, columns, kernel_dims)
        self.turn = nn.Parameter(turn)

    def up(self) -> Float[Tensor, "out inner"]:
        """Return the left factor of ΔW: Q beside Q' - Q."""
        half, rank = self.turn / 2, len(self.turn)
        one = torch.eye(2 * rank, dtype=half.dtype, device=half.device)
        skew = torch.zeros_like(one)
        skew[rank:, :rank], skew[:rank, rank:] = half, -half.T
        turned = torch.linalg.solve(one - skew, (one + skew)[:, :rank])
        every: Any = self.basis.q
        wide = every[:, : 2 * rank].to(half.dtype)
        return torch.cat([wide[:, :rank], wide @ (turned - one[:, :rank])], dim=1)


def _rotate(layers: Mapping[str, Any], recipe: Recipe) -> None:
    for layer in layers.values():
        _let_move(layer, RotatedColumns, recipe.rank, torch.zeros(recipe.rank, recipe.rank))


def _let_move(layer: Any, kind: type[BasisColumns], count: int, start: Tensor) -> None:
    """Replace the adapter's columns by ones that train, of a subclass of BasisColumns; ΔR gets R of the first count."""
    columns, delta = layer.lora_B[ADAPTER_NAME], layer.lora_A[ADAPTER_NAME]
    basis = columns.basis.fill(layer.base_weight())
    device = delta.weight.device
    delta.r = basis.r[list(columns.columns[:count])].to(device)
    make: Callable[..., BasisColumns] = kind
    layer.lora_B[ADAPTER_NAME] = make(columns.basis, columns.columns, columns._kernel_dims, start.to(device))


_ROWS = (
    AdapterMethod("lora", "A random, B zero, both train", "Hu et al. 2021, arXiv 2106.09685", _by_recipe("lora")),
    AdapterMethod(
        "pissa",
        "A and B start at the first singular triples",
        "Meng et al. 2024, arXiv 2404.02948",
        _by_peft(_lora("pissa")),
    ),
    AdapterMethod(
        "mica", "B frozen at the last left singular vectors", "PEFT's mica, arXiv 2604.01694", _by_peft(_lora("mica"))
    ),
    AdapterMethod("oft", "inputs rotated in blocks of 2 r", "Qiu et al. 2023, arXiv 2306.07280", _by_peft(_oft)),
    AdapterMethod("full", "the target matrices themselves train", "full fine-tuning", _full),
    AdapterMethod(
        "qrlora_published",
        "frozen Q of the first r columns, ΔR triangular: the published form",
        "arXiv 2507.04599",
        _by_recipe("qrlora_published"),
    ),
    AdapterMethod(
        "qrlora_dense", "the same with a dense ΔR", "arXiv 2507.04599, without the triangle", _by_recipe("qrlora_dense")
    ),
    AdapterMethod(
        "qrlora_trained",
        "Q and R both train, from the basis on",
        "arXiv 2507.04599, the fast mode",
        _by_recipe("qrlora_trained"),
    ),
    AdapterMethod(
        "qrlora",
        "subjects and styles own different columns of a basis twice as wide",
        "this package's default",
        _by_recipe("qrlora"),
    ),
    AdapterMethod(
        "q_cayley",
        "Q turned towards the next r columns of the basis by a trained rotation, ΔR triangular",
        "ours, Cayley transform as in arXiv 2306.07280",
        _by_peft(_triangular(2), _rotate),
    ),
    AdapterMethod(
        "q_activation",
        "frozen Q of the directions in which a layer puts out most on the task, dense ΔR; each adapter has its own",
        "after CorDA, arXiv 2406.05223, and EVA, arXiv 2410.07170: of outputs, for the side that writes",
        _on_directions(activation),
    ),
    AdapterMethod(
        "q_random", "one random Q for all adapters, dense ΔR", "control: which directions", _by_peft(_dense, _random)
    ),
)
ADAPTERS: dict[str, AdapterMethod] = {row.name: row for row in _ROWS}
"""Name -> method. Learning rates are no part of a method: the bench tunes them, for each alike."""
