"""Configuration of an adapter: LoRA's fields, the basis, and the columns that the adapter owns."""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence
from dataclasses import dataclass, field

from peft import LoraConfig, PeftType

from qrlora.errors import TunerError
from qrlora.method.basis import ALGORITHMS

NAMED_COLUMNS = {"subject": "0/2", "style": "1/2"}

# LoRA options that change B, the base weight or the shape of the update (all falsy by default). On a frozen shared Q
# each would be wrong or without effect, so they are refused rather than ignored.
_REFUSED_FIELDS = (
    "use_dora",
    "lora_bias",
    "use_qalora",
    "target_parameters",
    "ensure_weight_tying",
    "loftq_config",
    "eva_config",
    "corda_config",
    "lora_ga_config",
    "velora_config",
    "alora_invocation_tokens",
    "monteclora_config",
    "megatron_config",
    "layer_replication",
    "use_bdlora",
    "arrow_config",
    "kasa_config",
)


@dataclass
class QRLoraConfig(LoraConfig):
    """Configuration of a QR-LoRA adapter; every field of :class:`peft.LoraConfig` keeps its meaning.

    ``W' = W + (lora_alpha / r) Q ΔR`` with Q frozen and ΔR trained (arXiv 2507.04599). ``init_lora_weights=True``
    starts ΔR at zero, so a fresh adapter leaves the model as it was; ``False`` gives a random ΔR, for tests.

    Attributes:
        r: rank. A layer whose smaller side holds fewer basis columns than this adapter owns gets those of them that it
            has (see ``columns``); the scaling stays ``lora_alpha / r`` there, so that an entry of ΔR changes the weight
            equally in every layer and every adapter on the basis; sums of ΔR and a shared learning rate rely on it.
        triangular: keep ΔR upper triangular in the coordinates of the whole basis (the published form): the row of
            basis column c is zero left of entry c.
        basis_rank: rank of the basis the columns are taken from; by default the least that holds them.
        columns: which columns of the basis this adapter owns. ``first`` (the first r), ``i/n`` (i, i + n, i + 2n, ...),
            ``subject`` (``0/2``), ``style`` (``1/2``), or r increasing column numbers. A layer whose smaller side is
            k has columns 0 to k - 1 alone, so adapters that own disjoint columns own disjoint ones there too: ``i/n``
            an n-th of them, to one more or less, and none where k <= i (of a single column, the subject's). A layer
            that has none of the adapter's columns is left as it is.
        algorithm: ``fast`` or ``exact``, see :func:`qrlora.method.basis.layer_basis`.
        basis_seed: seed of the fast algorithm. Adapters compose only if rank, algorithm and seed agree.
        train_basis: train Q and R both (the published fast-convergence mode), as own copies that start at the basis.

    Raises:
        TunerError: an option that cannot work on a frozen basis, or columns that do not fit.
    """

    triangular: bool = field(default=True, metadata={"help": "Keep ΔR upper triangular"})
    basis_rank: int | None = field(default=None, metadata={"help": "Rank of the basis the columns are taken from"})
    columns: str | list[int] | tuple[int, ...] = field(
        default="first", metadata={"help": "Columns of the basis this adapter owns"}
    )
    algorithm: str = field(default="fast", metadata={"help": "Algorithm of the basis: fast or exact"})
    basis_seed: int = field(default=0, metadata={"help": "Seed of the fast algorithm"})
    train_basis: bool = field(default=False, metadata={"help": "Train Q and R both"})

    def __post_init__(self) -> None:
        super().__post_init__()  # type: ignore[no-untyped-call]
        self.peft_type = PeftType("QRLORA")
        if not isinstance(self.columns, str):
            self.columns = [int(column) for column in self.columns]
        self._refuse_what_cannot_work()
        for rank in {self.r, *(self.rank_pattern or {}).values()}:
            resolve_columns(self.columns, rank, self.rank_of_basis)

    @property
    def rank_of_basis(self) -> int:
        """``basis_rank``, or the least rank that holds the columns of every layer of this adapter."""
        if self.basis_rank is not None:
            return self.basis_rank
        widest = max([self.r, *(self.rank_pattern or {}).values()])
        return least_basis_rank(self.columns, widest)

    @property
    def basis_key(self) -> tuple[int, str, int]:
        """(rank, algorithm, seed) of the basis: adapters with equal keys share Q and can be summed in ΔR."""
        return self.rank_of_basis, self.algorithm, self.basis_seed

    def _refuse_what_cannot_work(self) -> None:
        changed = [name for name in _REFUSED_FIELDS if getattr(self, name)]
        if changed:
            raise TunerError(
                "options that do not work on a frozen basis",
                expected=f"the defaults, {_defaults(changed)}",
                got={name: getattr(self, name) for name in changed},
                remedy="remove them, or use peft.LoraConfig",
            )
        if not isinstance(self.init_lora_weights, bool):
            raise TunerError(
                "an initialisation that does not work on a frozen basis",
                expected="init_lora_weights True (ΔR is zero) or False (ΔR is random, for tests)",
                got=self.init_lora_weights,
                remedy="remove it, or use peft.LoraConfig",
            )
        if self.algorithm not in ALGORITHMS:
            raise TunerError("unknown basis algorithm", expected=" or ".join(ALGORITHMS), got=self.algorithm)


def _defaults(names: Sequence[str]) -> dict[str, object]:
    """Return LoraConfig's defaults of these fields."""
    plain = LoraConfig()
    return {name: getattr(plain, name) for name in names}


def least_basis_rank(columns: str | Sequence[int], r: int) -> int:
    """Rank of the smallest basis with ``r`` such columns: r, n * r for ``i/n``, one past the last for a list."""
    if not isinstance(columns, str):
        return max(columns, default=0) + 1
    return r if columns == "first" else r * _residue(columns)[1]


def resolve_columns(columns: str | Sequence[int], r: int, basis_rank: int | None = None) -> tuple[int, ...]:
    """Return the column numbers that a ``columns`` field stands for, increasing.

    Args:
        columns: as in :class:`QRLoraConfig`.
        r: how many columns the adapter has.
        basis_rank: rank of the basis; the least that holds them unless given.

    Raises:
        TunerError: unknown words, columns that are not increasing, not r in number, or beyond the basis.
    """
    basis_rank = least_basis_rank(columns, r) if basis_rank is None else basis_rank
    if not isinstance(columns, str):
        resolved = tuple(columns)
    elif columns == "first":
        resolved = tuple(range(r))
    else:
        start, step = _residue(columns)
        resolved = tuple(range(start, start + step * r, step))
    increasing = all(a < b for a, b in itertools.pairwise(resolved))
    if r < 1 or len(resolved) != r or not increasing or resolved[0] < 0 or resolved[-1] >= basis_rank:
        raise TunerError(
            "columns that do not fit the basis",
            expected=f"r = {r} (at least 1) increasing column numbers below basis_rank = {basis_rank}",
            got=f"columns={columns!r}, that is {len(resolved)}: {', '.join(map(str, resolved[:16]))}",
            remedy="set r to the number of columns, or raise basis_rank",
        )
    return resolved


def _residue(columns: str) -> tuple[int, int]:
    """Return (i, n) of ``i/n`` or of a named set."""
    start, slash, step = NAMED_COLUMNS.get(columns, columns).partition("/")
    numbers = re.fullmatch(r"[0-9]{1,9}/[0-9]{1,9}", f"{start}{slash}{step}")
    if numbers and int(start) < int(step):
        return int(start), int(step)
    raise TunerError(
        "unknown columns",
        expected=f"'first', 'i/n' with i < n, {', '.join(map(repr, NAMED_COLUMNS))}, or a list of column numbers",
        got=repr(columns),
        remedy="name one of these",
    )
