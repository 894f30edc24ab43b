"""ΔW of every layer of an adapter of any kind: on disk, in a denoiser, and in factors.

Methods differ in what they train, and agree in what comes out: another weight. So everything that is compared here
(merges, measures of files, pictures) speaks of ΔW alone, and no method needs a layer of its own at generation.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import safetensors.torch
import torch
from jaxtyping import Float
from safetensors import safe_open
from torch import Tensor, nn

from qrlora._files import write_atomically
from qrlora._reading import parsing
from qrlora.errors import AdapterFileError, MismatchError

NOTHING = 1e-12
"""Singular values below this share of the largest are none."""


@dataclass(frozen=True, eq=False)
class Delta:
    """ΔW of one layer, float32: `up @ down`, or `matrix` where it has no small rank. A convolution's is flattened.

    up (out, rank) and down (rank, in), or matrix (out, in). Raises MismatchError if it is neither or both.
    """

    up: Tensor | None = None
    down: Tensor | None = None
    matrix: Tensor | None = None

    def __post_init__(self) -> None:
        factored = self.up is not None and self.down is not None
        if factored == (self.matrix is not None) or (self.up is None) != (self.down is None):
            parts = [name for name in ("up", "down", "matrix") if getattr(self, name) is not None]
            raise MismatchError("no ΔW", expected="up and down, or matrix", got=parts)
        if self.up is not None and self.down is not None and self.up.shape[1] != self.down.shape[0]:
            got = f"up {tuple(self.up.shape)}, down {tuple(self.down.shape)}"
            raise MismatchError("factors that cannot be multiplied", expected="up (out, r), down (r, in)", got=got)

    @property
    def factors(self) -> tuple[Float[Tensor, "out rank"], Float[Tensor, "rank in"]] | None:
        """up and down; None if it is dense."""
        return None if self.up is None or self.down is None else (self.up, self.down)

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in)."""
        up, down = (self.whole, self.whole) if self.factors is None else self.factors
        return len(up), down.shape[1]

    @property
    def rank(self) -> int:
        """The rank of its form: columns of up, or the smaller side of the matrix."""
        return min(self.shape) if self.factors is None else self.factors[0].shape[1]

    @property
    def whole(self) -> Float[Tensor, "out in"]:
        """The matrix of a dense ΔW. Raises MismatchError for a factored one, whose is made by `dense`."""
        if self.matrix is None:
            raise MismatchError("ΔW in factors", expected="a dense one", got="up and down", remedy="call dense()")
        return self.matrix

    def dense(self) -> Float[Tensor, "out in"]:
        """ΔW as a matrix."""
        return self.whole if self.factors is None else self.factors[0] @ self.factors[1]

    def scaled(self, weight: float) -> Delta:
        """Return weight · ΔW, in the same form."""
        if self.factors is None:
            return Delta(matrix=self.whole * weight)
        return Delta(self.factors[0], self.factors[1] * weight)

    @property
    def rows(self) -> Float[Tensor, "rank in"]:
        """The factor on the input side: down, or the matrix."""
        return self.whole if self.factors is None else self.factors[1]

    @property
    def reads(self) -> Float[Tensor, "rank in"]:
        """Rows that span the row space of ΔW: R · down where up = Q R; float64."""
        if self.factors is None:
            return self.whole.double()
        return torch.linalg.qr(self.factors[0].double()).R @ self.factors[1].double()

    def with_rows(self, rows: Float[Tensor, "rank in"]) -> Delta:
        """ΔW with another factor on the input side."""
        return Delta(matrix=rows) if self.factors is None else Delta(self.factors[0], rows)

    def decomposed(self) -> tuple[Float[Tensor, "out k"], Float[Tensor, " k"], Float[Tensor, "k in"]]:
        """(U, s, Vᵀ) in float64, of what is not zero; of factors by QR of each and an SVD of the small core."""
        if self.factors is None:
            left, values, right = torch.linalg.svd(self.whole.double(), full_matrices=False)
        else:
            up, down = self.factors
            q_left, r_left = torch.linalg.qr(up.double())
            q_right, r_right = torch.linalg.qr(down.double().T)
            u, values, vh = torch.linalg.svd(r_left @ r_right.T, full_matrices=False)
            left, right = q_left @ u, vh @ q_right.T
        kept = int((values > NOTHING * values.max().clamp(min=torch.finfo(values.dtype).tiny)).sum())
        return left[:, :kept], values[:kept], right[:kept]


Learned = dict[str, Delta]
"""Layer name in the denoiser, such as "transformer_blocks.0.attn.to_q" -> ΔW at strength 1."""


def inner(a: Delta, b: Delta) -> float:
    """⟨A, B⟩_F in float64, without forming the product of factors: Σ (Uₐᵀ U_b) ∘ (Dₐ D_bᵀ)."""
    if a.factors is None and b.factors is not None:
        return inner(b, a)
    if a.factors is None:
        return float((a.whole.double() * b.whole.double()).sum())
    up, down = (factor.double() for factor in a.factors)
    if b.factors is None:
        return float(((up.T @ b.whole.double()) * down).sum())
    return float(((up.T @ b.factors[0].double()) * (down @ b.factors[1].double().T)).sum())


def total(parts: Sequence[Delta]) -> Delta:
    """Σ ΔWᵢ: factors side by side while that is smaller than the matrix, which is exact either way."""
    factors = [part.factors for part in parts]
    out, width = parts[0].shape
    rank = sum(part.rank for part in parts)
    if any(pair is None for pair in factors) or rank * (out + width) >= out * width:
        return Delta(matrix=torch.stack([part.dense() for part in parts]).sum(0))
    ups, downs = zip(*(pair for pair in factors if pair is not None), strict=True)
    return Delta(torch.cat(ups, dim=1), torch.cat(downs))


def scaled(learned: Learned, weight: float) -> Learned:
    """Scale every ΔW."""
    return {name: delta.scaled(weight) for name, delta in learned.items()}


def save_learned(path: Path | str, learned: Learned, metadata: Mapping[str, str] | None = None) -> None:
    """Write `<layer>.up` and `.down`, or `<layer>.matrix`, to one safetensors file, whole or not at all."""
    tensors = {
        f"{name}.{part}": tensor.contiguous()
        for name, delta in learned.items()
        for part in ("up", "down", "matrix")
        if (tensor := getattr(delta, part)) is not None
    }
    write_atomically(Path(path), safetensors.torch.save(tensors, dict(metadata or {})))


def load_learned(path: Path | str) -> Learned:
    """Read a file of `save_learned`. Raises AdapterFileError for any other file."""
    parts: dict[str, dict[str, Tensor]] = {}
    expected = "a file that save_learned wrote"
    with parsing(f"{path} holds no ΔW", AdapterFileError, expected=expected, remedy="train it again"):
        with safe_open(path, framework="pt") as file:
            for key in file.keys():  # noqa: SIM118 (not a dict)
                name, _, part = key.rpartition(".")
                parts.setdefault(name, {})[part] = file.get_tensor(key)
        try:
            return {name: Delta(**tensors) for name, tensors in parts.items()}
        except MismatchError as error:  # which names no file
            raise ValueError(error.what) from error


def base_weights(denoiser: nn.Module, names: Sequence[str]) -> dict[str, nn.Parameter]:
    """The weight of each of these layers. Raises MismatchError that lists those that the denoiser lacks."""
    modules = dict(denoiser.named_modules())
    found = {name: getattr(modules.get(name), "weight", None) for name in names}
    if missing := [name for name, weight in found.items() if not isinstance(weight, nn.Parameter)]:
        raise MismatchError(
            f"the model lacks {len(missing)} of {len(found)} layers",
            expected=missing,
            got=type(denoiser).__name__,
            remedy="use the base model it was learned on, without adapters attached",
        )
    return {name: weight for name, weight in found.items() if isinstance(weight, nn.Parameter)}


class Overlay:
    """ΔW written over the base weights of a denoiser, one after another; `lift` puts the copies back, bit for bit."""

    def __init__(self, denoiser: nn.Module):
        self._denoiser = denoiser
        self._copies: dict[str, Tensor] = {}
        self._shown: Learned = {}

    @torch.no_grad()
    def show(self, learned: Learned) -> None:
        """Base weights + ΔW, summed in float32. A layer whose ΔW is the very one it shows is left alone."""
        layers = base_weights(self._denoiser, list({**self._copies, **learned}))
        for name, parameter in layers.items():
            original = self._copies.setdefault(name, parameter.detach().clone())
            if name not in learned:
                parameter.copy_(original)
            elif learned[name] is not self._shown.get(name):
                delta = learned[name].dense().to(parameter.device)
                if delta.numel() != parameter.numel():
                    got = f"{tuple(delta.shape)} for {tuple(parameter.shape)}"
                    raise MismatchError(f"{name}: ΔW of another shape", expected=tuple(parameter.shape), got=got)
                parameter.copy_(original.float() + delta.reshape(parameter.shape))
        self._shown = learned

    @torch.no_grad()
    def lift(self) -> None:
        """Restore the base weights."""
        for name, parameter in base_weights(self._denoiser, list(self._copies)).items():
            parameter.copy_(self._copies[name])
        self._copies, self._shown = {}, {}


@contextlib.contextmanager
def applied(denoiser: nn.Module, learned: Learned) -> Iterator[None]:
    """Add ΔW to the denoiser's weights while the block runs; restore them bit for bit.

    Raises MismatchError if a layer is missing or of another shape.
    """
    overlay = Overlay(denoiser)
    try:
        overlay.show(learned)
        yield
    finally:
        overlay.lift()
