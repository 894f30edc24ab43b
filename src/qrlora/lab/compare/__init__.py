"""The head-to-head on pico: every method trained on one picture, composed, and judged where the truth is known.

plan.py     what is compared, on what, and how much of it
cells.py    one measurement: train an adapter; look at it alone, in a composition, over weights, among many
run.py      all cells of a plan, over processes, each kept under a digest of everything that decides it
tables.py   means, intervals over pairs, paired differences, and what the files foretell
page.py     the report: HTML, JSON, CSV, plots
tuning.py   the learning rates of every method, on none of the parts that they are for
"""

from __future__ import annotations

from qrlora.lab.compare.plan import Row

__all__ = ["Row", "about"]


def about(row: Row) -> str:
    """Describe a row of the table, with its source."""
    from qrlora.lab.baselines.adapters import ADAPTERS
    from qrlora.lab.baselines.merges import MERGES

    method = ADAPTERS[row.adapter]
    if row.merge == "sum":
        return f"{method.about} ({method.source})"
    if row.joint:
        return f"{row.adapter} trained on both pictures at once: the ceiling"
    merge = MERGES[row.merge]
    options = "".join(f", {name} {value}" for name, value in row.options.items())
    return f"{row.adapter} adapters, {merge.about}{options} ({merge.source})"
