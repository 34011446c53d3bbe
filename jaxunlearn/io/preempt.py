# SPDX-License-Identifier: Apache-2.0
"""Being asked to stop: a spot machine that is taken sends SIGTERM shortly before.

asked = preempt.watch()
hook = preempt.hook(saved, every=100, steps=1000, asked=asked, config=config)
state, _ = ju.fit(step, state, loader, steps=1000, hooks=[hook])
checkpoint.wait(saved)
if asked():
    raise SystemExit(preempt.EXIT)
"""

import signal
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from jaxunlearn import _checks
from jaxunlearn.io import checkpoint

EXIT = 75
"""Exit status of a run that was asked to stop, saved, and can go on by the same command
(EX_TEMPFAIL of sysexits.h)."""

Hook = Callable[[Any, Mapping[str, Any]], bool]


def watch(*signals: signal.Signals) -> Callable[[], bool]:
    """Waits for signals, SIGTERM if none is named, instead of dying of them.

    Call it in the main thread, after `sharding.initialize`, and once.

    Returns:
        A function that says whether any process was asked to stop. Where there are
        several, all of them must call it at the same places, and all get one answer.
    """
    came: list[int] = []
    for each in signals or (signal.SIGTERM,):
        signal.signal(each, lambda number, _: came.append(number))

    def asked() -> bool:
        if jax.process_count() == 1:
            return bool(came)
        return bool(multihost_utils.process_allgather(np.array(bool(came))).any())

    return asked


def hook(
    saved: checkpoint.Checkpoints,
    *,
    every: int,
    steps: int,
    asked: Callable[[], bool] = lambda: False,
    data: Callable[[int], Any] = lambda step: {"batches": step},
    config: Mapping[str, Any] | None = None,
) -> Hook:
    """A hook for fit that saves every few steps, at the end, and when asked to stop.

    Args:
        saved: from checkpoint.open; the run's own steps go on from its last.
        every: steps between checkpoints.
        steps: the run's last step.
        asked: from `watch`; once it says True, this step is saved and fit stops.
        data: where the loader stands after so many steps.
        config: kept in the checkpoint.
    """
    _checks.positive_int("preempt.hook", every=every, steps=steps)

    def call(state: Any, entry: Mapping[str, Any]) -> bool:
        if not entry.get("finite", True):
            return False  # nothing was updated, and fit is about to say so
        done, stop = entry["step"] + 1, asked()
        if stop or done % every == 0 or done == steps:
            checkpoint.save(saved, done, state, data=data(done), config=config)
        return stop

    return call
