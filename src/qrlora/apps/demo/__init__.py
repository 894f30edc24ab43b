"""Demonstrate the whole job in one command: train a subject and a style on one picture each, compose, judge, report.

plan.py   what is trained, by which methods, how much of everything, and what is asked for afterwards
flow.py   the steps, and what they found
numbers.py, page.py   what they found, as report.json and as a page
command.py   all of it in one call
"""

from __future__ import annotations

from qrlora.apps.demo.command import run

__all__ = ["run"]
