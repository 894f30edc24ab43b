"""What pictures show, counted, and put on a page a person can look at.

shares.py       Share: "19 of 24", with its Wilson interval; the difference of two shares
report.py       Report: blocks of text, pictures and numbers -> one self-contained report.html, and report.json
pictures.py     Exhibit: a picture as it is measured, with its mask and its prompt
measures.py     the table of measures, and those that need no weights; copies.py: is it a training picture
learned.py      what DINOv2, CLIP, CSD and LPIPS see, from weights on the user's disk
brand.py        Sheet: what a brand asks, and its verdicts; assessment.py: groups of pictures measured and judged
study.py        a blind vote of people, as a page; tally.py: its count
tune.py         the search of a composition's weights; dials.py: what it turns and looks at; tune_page.py: its report
rivals/         other ways of training and merging, to compare with
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
