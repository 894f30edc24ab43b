"""A training loop that can stop at any step and go on as if it had not, and its log."""

from __future__ import annotations

import io
import json
import math
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qrlora._files import disk_error, write_atomically
from qrlora._interrupts import deferred
from qrlora.errors import TrainingError
from qrlora.pico.pretraining import processes


def log(work: Path, stage: str, **facts: object) -> None:
    """Write one line of JSON to the log file and to the terminal; of several processes the first does."""
    if processes.RANK:
        return
    line = json.dumps({"stage": stage, "time": round(time.time()), **facts})
    print(line, flush=True)
    path = work / "log.jsonl"
    try:
        with open(path, "a") as file:
            file.write(line + "\n")
    except OSError as error:
        raise disk_error(error, path) from error


def saved(state: dict[str, Any]) -> bytes:
    """Return the bytes of torch.save, which on a full disk raises errors of its own."""
    stream = io.BytesIO()
    torch.save(state, stream)
    return stream.getvalue()


@dataclass
class Run:
    """A training run that can stop at any step and go on as if it had not; a signal ends it after a save.

    ema: decay of the weights' moving average, 0 for none. seconds: least time between two saves and between two lines
    of the log, instead of every so many steps. keep_last: the save before the last one stays, as ``<name>.before.pt``.
    """

    work: Path
    name: str
    modules: dict[str, nn.Module]
    optimisers: list[torch.optim.Optimizer]
    steps: int
    schedule: Callable[[float], float]  # progress in [0, 1] to a factor on every learning rate
    step: int = 0
    ema: float = 0.0
    seconds: tuple[float, float] | None = None
    keep_last: bool = False
    average: list[Tensor] = field(default_factory=list)

    @property
    def file(self) -> Path:
        return self.work / f"{self.name}.pt"

    @property
    def _weights(self) -> list[Tensor]:
        return [p.detach() for module in self.modules.values() for p in module.parameters()]

    def restore(self) -> None:
        """Load the last checkpoint, if there is one."""
        for optimiser in self.optimisers:
            for group in optimiser.param_groups:
                group.setdefault("base_lr", group["lr"])
        if self.ema:
            self.average = [p.clone() for p in self._weights]
        if self.file.exists():
            state = torch.load(self.file, weights_only=True)
            self.step = state["step"]
            if self.step > self.steps:
                raise TrainingError(
                    f"{self.file} has more steps behind it than are asked for",
                    expected=f"{self.step} or more",
                    got=self.steps,
                    remedy="ask for more steps, or name another --work",
                )
            for name, module in self.modules.items():
                module.load_state_dict(state["modules"][name])
            for optimiser, saved in zip(self.optimisers, state["optimisers"], strict=True):
                optimiser.load_state_dict(saved)
            if self.ema:
                self.average = [a.to(p.device) for a, p in zip(state["average"], self._weights, strict=True)]

    def save(self) -> None:
        """Write a checkpoint whole; of several processes, which hold the same, the first does."""
        if processes.RANK:
            return
        modules = {n: m.state_dict() for n, m in self.modules.items()}
        state = {"step": self.step, "modules": modules, "optimisers": [o.state_dict() for o in self.optimisers]}
        if self.ema:
            state["average"] = self.average
        if self.keep_last and self.file.exists():  # a second name for the old file, so that there is one at any time
            spare = self.work / f"{self.name}.spare"
            spare.unlink(missing_ok=True)
            os.link(self.file, spare)
            os.replace(spare, self.work / f"{self.name}.before.pt")
        write_atomically(self.file, saved(state))

    def go(self, loss_of: Callable[[int], Tensor], every: int = 100) -> None:
        """Run to the last step. ``loss_of(step)`` draws all its randomness from the step's own seed."""
        with deferred() as interrupted:
            if self._loop(loss_of, every, interrupted):
                raise KeyboardInterrupt(f"interrupted after step {self.step}; the same command goes on from there")

    def _loop(self, loss_of: Callable[[int], Tensor], every: int, interrupted: Callable[[], bool]) -> bool:
        """Take the steps that are left; return True if the run was told to end."""
        saved = told = time.time()
        first, total, ending = self.step, 0.0, interrupted()
        while self.step < self.steps and not ending:
            loss, ending = self._advance(loss_of, interrupted)
            total += loss
            now, last = time.time(), self.step == self.steps or ending
            by_step = self.step % every == 0
            if last or (now - saved >= self.seconds[0] if self.seconds else by_step):
                self.save()
                saved = now
            if last or (now - told >= self.seconds[1] if self.seconds else by_step):
                steps = self.step - first
                each = {"loss": round(total / steps, 5), "seconds_per_step": round((now - told) / steps, 3)}
                log(self.work, self.name, step=self.step, **each)
                told, first, total = now, self.step, 0.0
        return ending

    def _advance(self, loss_of: Callable[[int], Tensor], interrupted: Callable[[], bool]) -> tuple[float, bool]:
        """Take one step; return its loss, and whether the run has been told to end."""
        factor = self.schedule(self.step / self.steps)
        for optimiser in self.optimisers:
            for group in optimiser.param_groups:
                group["lr"] = group["base_lr"] * factor
            optimiser.zero_grad(set_to_none=True)
        own = loss_of(self.step)
        own.backward()
        loss, ending = processes.averaged(
            (p for m in self.modules.values() for p in m.parameters()), own, interrupted()
        )
        if not math.isfinite(loss):
            raise FloatingPointError(f"{self.name}: loss is {loss} at step {self.step}")
        for module in self.modules.values():
            nn.utils.clip_grad_norm_(module.parameters(), 1.0)
        for optimiser in self.optimisers:
            optimiser.step()
        self.step += 1
        if self.ema:  # a young average forgets faster, or it would remember the start for a thousand steps
            decay = min(self.ema, (1 + self.step) / (10 + self.step))
            torch._foreach_lerp_(self.average, self._weights, 1 - decay)
        return loss, ending


def trapezoid(progress: float, warm: float = 0.02, cool: float = 0.3) -> float:
    """Warm up, hold, then fall linearly to zero: the last stretch is where a short run gains most."""
    return min(1.0, (progress + 1e-3) / warm, max(0.0, (1 - progress) / cool))
