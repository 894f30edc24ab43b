"""Set other libraries up before they are loaded: fewer messages, idle threads that sleep.

Off are messages that no user of a command can act on:

- torchao: each of its GPU kernels, on every machine without that GPU; and through torch.utils._pytree, that it
  registers two enums in a way that torch will not need.
- bitsandbytes: a package for 4-bit products on processors with bfloat16 arithmetic; it does without.
- transformers and diffusers: optional parts that are not installed (torchvision, parts of torchao), which they do
  without; whoever wants to read that sets TRANSFORMERS_VERBOSITY or DIFFUSERS_VERBOSITY.
"""

from __future__ import annotations

import logging
import os

TALKATIVE = ("torchao", "torch.utils._pytree", "bitsandbytes.backends.cpu.ops")


def hush() -> None:
    """Let these libraries speak of errors alone, in this process; of diffusers and transformers in those it starts."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
    for name in TALKATIVE:
        logging.getLogger(name).setLevel(logging.ERROR)


def wait_passively() -> None:
    """Let idle OpenMP threads sleep instead of spin, unless the user has chosen. Call it before torch is loaded.

    By default threads that wait for one another keep their core busy, so two processes that share cores slow each other
    down several times over. Alone a run takes as long either way.
    """
    if not {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT"} & os.environ.keys():
        os.environ.update(OMP_WAIT_POLICY="PASSIVE", GOMP_SPINCOUNT="0")
