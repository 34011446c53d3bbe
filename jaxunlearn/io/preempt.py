# SPDX-License-Identifier: Apache-2.0
"""Stopping on a signal: SIGTERM, which comes before a spot machine is taken, or Ctrl-C.

For example:

    stop = preempt.watch()
    hook = preempt.hook(saved, every=100, steps=1000, stop=stop, config=config)
    state, _ = ju.fit(step, state, loader, steps=1000, hooks=[hook])
    checkpoint.wait(saved)
    if stop():
        raise SystemExit(stop.status)
"""

import signal
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from jaxunlearn import _checks
from jaxunlearn.io import checkpoint

TERMINATED = 75
"""Exit status of a run that saved its state after SIGTERM (EX_TEMPFAIL of sysexits.h).
The same command resumes it."""

INTERRUPTED = 130
"""Exit status of a run that saved its state after SIGINT (Ctrl-C)."""

Hook = Callable[[Any, Mapping[str, Any]], bool]


class Stopped(Exception):
    """A run saved its state and stopped on a signal.

    Attributes:
        status: the exit status for the program, TERMINATED or INTERRUPTED.
    """

    def __init__(self, message: str, status: int):
        super().__init__(message)
        self.status = status


class Stop:
    """Whether a signal arrived; `watch` makes it. It is a context manager, too: at its
    end the handlers from before are back."""

    def __init__(
        self,
        signals: tuple[signal.Signals, ...],
        callback: Callable[[signal.Signals], Any] | None = None,
    ):
        self._first: int | None = None
        self._callback = callback
        self._before = {each: signal.signal(each, self._arrived) for each in signals}

    def _arrived(self, number: int, frame: Any) -> None:
        del frame
        if self._first is not None and number == signal.SIGINT:
            self.close()  # a second Ctrl-C ends the program without saving
            raise KeyboardInterrupt
        if self._first is None and self._callback:
            self._callback(signal.Signals(number))
        self._first = self._first or number

    def __call__(self) -> bool:
        """Whether any process got a signal. Where there are several processes, all of
        them must call this at the same places, and all get the same answer."""
        if jax.process_count() == 1:
            return self._first is not None
        here = np.array(self._first is not None)
        return bool(multihost_utils.process_allgather(here).any())

    @property
    def status(self) -> int:
        """The exit status that belongs to the first signal."""
        return INTERRUPTED if self._first == signal.SIGINT else TERMINATED

    def close(self) -> None:
        """Puts the handlers from before back."""
        for each, handler in self._before.items():
            signal.signal(each, handler)

    def __enter__(self) -> "Stop":
        return self

    def __exit__(self, *exception: Any) -> None:
        self.close()


def watch(
    *signals: signal.Signals,
    callback: Callable[[signal.Signals], Any] | None = None,
) -> Stop:
    """Notes signals instead of ending the program.

    Call it in the main thread, after `sharding.initialize`.

    Args:
        signals: SIGTERM and SIGINT if none is given.
        callback: called with the first signal, such as a function that prints a line.
    """
    return Stop(signals or (signal.SIGTERM, signal.SIGINT), callback)


def hook(
    saved: checkpoint.Checkpoints,
    *,
    every: int,
    steps: int,
    stop: Callable[[], bool] = lambda: False,
    data: Callable[[int], Any] = lambda step: {"batches": step},
    config: Mapping[str, Any] | None = None,
) -> Hook:
    """A hook for fit that saves every few steps, at the end, and on a signal.

    It reads the state at these steps only, so that fit runs ahead at all others. A
    signal that arrives after the next step was started is noticed at that step.

    Args:
        saved: from checkpoint.open.
        every: steps between checkpoints.
        steps: the run's last step.
        stop: from `watch`; when it returns True, the step that runs is saved and fit
            stops.
        data: the loader's position after so many steps.
        config: stored in the checkpoint.
    """
    _checks.positive_int("preempt.hook", every=every, steps=steps)

    def regular(step: int) -> bool:
        return (step + 1) % every == 0 or step + 1 == steps

    def call(state: Any, entry: Mapping[str, Any]) -> bool:
        if state is None or not entry.get("finite", True):
            return False  # nothing to save: the next step runs, or fit raises NotFinite
        stopping = stop()
        if stopping or regular(entry["step"]):
            done = entry["step"] + 1
            checkpoint.save(saved, done, state, data=data(done), config=config)
        return stopping

    call.reads_state = lambda step: stop() or regular(step)
    return call
