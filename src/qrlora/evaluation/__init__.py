"""What pictures show, counted, and put on a page a person can look at.

shares.py   Share: "19 of 24", with its Wilson interval; the difference of two shares
report.py   Report: blocks of text, pictures and numbers -> one self-contained report.html, and report.json
"""

from __future__ import annotations

from qrlora.evaluation.report import (
    Bars,
    Code,
    Equation,
    Figure,
    Figures,
    Gallery,
    Matrix,
    Picture,
    Prose,
    Report,
    Section,
    Table,
)
from qrlora.evaluation.shares import Share, difference

__all__ = [
    "Bars",
    "Code",
    "Equation",
    "Figure",
    "Figures",
    "Gallery",
    "Matrix",
    "Picture",
    "Prose",
    "Report",
    "Section",
    "Share",
    "Table",
    "difference",
]
