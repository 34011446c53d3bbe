# SPDX-License-Identifier: Apache-2.0
"""The Python loop around a step: data in, metrics out, hooks in between."""

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from jaxunlearn import _checks
from jaxunlearn.step import Step, UnlearnState
from jaxunlearn.typing import Frozen, Streams

Entry = Mapping[str, float | int]
Hook = Callable[[UnlearnState, Entry], bool | None]
"""Called after every step, the failed one included, with the state and the log entry;
True stops the run. The state's buffers are donated to the next step: a hook that keeps
one must copy it."""


class NotFinite(FloatingPointError):
    """A loss or a gradient was not finite; nothing was updated by that step.

    Attributes:
        state: the last good state.
        log: entries of the steps before and of the failed one.
        step: the failed step's number, from 0.
        term: the term to blame.
    """

    def __init__(
        self, message: str, state: UnlearnState, log: list, step: int, term: str
    ):
        super().__init__(message)
        self.state, self.log, self.step, self.term = state, log, step, term


def fit(
    step: Step,
    state: UnlearnState,
    loader: Iterable[Streams],
    frozen: Frozen = Frozen(),
    *,
    steps: int,
    hooks: Sequence[Hook] = (),
    progress: bool = False,
) -> tuple[UnlearnState, list[dict[str, Any]]]:
    """Runs `step` over the loader until `steps` updates are done.

    The number of a step is the state's own: a state restored after 30 steps goes on
    with the 31st, so hand it a loader that does too (data.streams has `skip`, a
    data.loader its set_state).

    Args:
        step: from make_step, jitted with the state donated.
        state: where to begin; its buffers are given up.
        loader: yields streams of NumPy or JAX arrays, at least as many as are needed.
        frozen: what the step reads and never changes.
        steps: total number of updates, those before `state` included.
        hooks: called in order after every step.
        progress: whether to show a live progress bar (on standard error).
    Returns:
        (state, log); each log entry holds `step`, `seconds` and every metric as a
        number.
    Raises:
        ValueError: if the loader ends too early.
        NotFinite: at the first loss or gradient that is not finite; it carries the last
            good state.
    """
    _checks.not_negative("fit", steps=steps)
    log: list[dict[str, Any]] = []
    batches = iter(loader)
    bar = _Bar(steps, int(state.step)) if progress else None
    try:
        for number in range(int(state.step), steps):
            streams = _next(batches, number, steps)
            start = time.perf_counter()
            state, metrics = step(state, streams, frozen)
            metrics = {
                k: np.asarray(v).item() for k, v in jax.device_get(metrics).items()
            }
            entry = {"step": number, "seconds": time.perf_counter() - start, **metrics}
            log.append(entry)
            stop = any([hook(state, entry) for hook in hooks])
            if not entry.get("finite", True):
                _refuse(state, log, entry)
            if bar:
                bar.update(entry)
            if stop:
                break
    finally:
        if bar:
            bar.close()
    return state, log


def _next(batches, number: int, steps: int) -> Streams:
    try:
        return next(batches)
    except StopIteration:
        raise ValueError(
            f"fit needs a batch for each of {steps} steps, but the loader ended before "
            f"step {number}. Give it more epochs, or ask for fewer steps."
        ) from None


def _refuse(state, log, entry):
    bad = [name for name, value in entry.items() if not np.isfinite(value)]
    term = bad[0].split("/")[0] if bad else "the combiner"
    what = ", ".join(f"{name}={entry[name]}" for name in bad) or "the combined update"
    raise NotFinite(
        f"Step {entry['step']} needed finite losses and gradients, but term {term!r} "
        f"gave {what}. The update was dropped; the last good state is this error's "
        "`state`. Look at that batch, lower the learning rate, or bound the loss (npo "
        "for ascent).",
        state,
        log,
        entry["step"],
        term,
    )


class _Bar:
    """A progress bar with each term's loss beside it."""

    def __init__(self, steps: int, done: int):
        from tqdm import tqdm  # only where a bar is wanted

        self.bar = tqdm(total=steps, initial=done, unit="step", dynamic_ncols=True)

    def update(self, entry: Entry) -> None:
        losses = {
            name.removesuffix("/loss"): f"{value:.3g}"
            for name, value in entry.items()
            if name.endswith("/loss")
        }
        self.bar.set_postfix(losses, refresh=False)
        self.bar.update(1)

    def close(self) -> None:
        self.bar.close()
