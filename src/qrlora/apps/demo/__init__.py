"""The whole job in one command: teach a subject and a style from one picture each, put them together, judge, report.

plan.py   what is taught, by which methods, how much of everything, and what is asked for afterwards
flow.py   the steps, and what they found
numbers.py, page.py   what they found, as report.json and as a page
"""

from __future__ import annotations

from qrlora.apps.demo.flow import run

__all__ = ["run"]
