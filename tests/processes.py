"""What several processes do together, for test_processes.py: `torchrun --nproc-per-node 2 processes.py JOBS.json`.

A job is the fields of a recipe, and whether it is resumed or interrupted: after step 2 of the main process, by a Ctrl-C
that reaches the other one alone. Losses go to `<output>.losses.json`, how a process was stopped to
`<output>.stopped<rank>`.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

from accelerate import PartialState

from qrlora.models.training.loop import Progress, TrainingInterrupted, train
from qrlora.models.training.recipe import Recipe


def run(fields: dict[str, Any], resume: bool = False, interrupt: bool = False) -> None:
    recipe, losses = Recipe.of(fields), []
    output, rank = Path(str(recipe.output)), PartialState().process_index
    Path(f"{output}.pid{rank}").write_text(str(os.getpid()))
    PartialState().wait_for_everyone()

    def keep(progress: Progress) -> None:
        losses.append(progress.loss)
        if interrupt and progress.step == 2:
            os.kill(int(Path(f"{output}.pid1").read_text()), signal.SIGINT)

    try:
        train(recipe, progress=keep, resume=resume)
    except TrainingInterrupted as stopped:
        Path(f"{output}.stopped{rank}").write_text(f"{stopped.step} {stopped.checkpoint}")
    if losses:
        Path(f"{output}.losses.json").write_text(json.dumps(losses))


if __name__ == "__main__":
    PartialState(cpu=True)
    for job in json.loads(Path(sys.argv[1]).read_text()):
        run(**job)
    PartialState().destroy_process_group()
