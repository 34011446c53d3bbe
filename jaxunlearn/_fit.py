# SPDX-License-Identifier: Apache-2.0
"""The Python loop around a step: data in, metrics out, hooks in between."""

import itertools
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import reduce
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxunlearn import _checks, trees
from jaxunlearn._step import Step, UnlearnState
from jaxunlearn.typing import Frozen, Params, Streams

Entry = Mapping[str, float | int]
Hook = Callable[[UnlearnState, Entry], bool | None]
"""Called after every step, the failed one included, with the state and the log entry;
True stops the run. The state's buffers are donated to the next step: a hook that keeps
one must copy it."""


class NotFinite(FloatingPointError):
    """A loss or a gradient was not finite; nothing was updated by that step.

    Attributes:
        state: the last good state (of `fit_stages`, the states of all parts).
        rest: of `fit_stages`, the rest to go on with; else None.
        log: entries of the steps before and of the failed one.
        step: the failed step's number, from 0.
        term: the term to blame.
    """

    def __init__(
        self, message: str, state: UnlearnState, log: list, step: int, term: str
    ):
        super().__init__(message)
        self.state, self.log, self.step, self.term = state, log, step, term
        self.rest: Params = None


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


class Stage(NamedTuple):
    """So many updates of one part of the params, while all others stay."""

    part: str
    steps: int


def fit_stages(
    steps: Mapping[str, Step],
    states: Mapping[str, UnlearnState],
    batches: Mapping[str, Callable[[int], Streams]],
    stages: Sequence[Stage],
    rest: Params = None,
    *,
    ref: Params | None = None,
    hooks: Sequence[Hook] = (),
    after: Callable[[str, Params, Params], Params] | None = None,
) -> tuple[dict[str, UnlearnState], Params, list[dict[str, Any]]]:
    """Trains parts of a model in turns, each with an optimizer state of its own.

    In a stage the leaves of one part train and no other moves. A part's state (its
    moments, its count of steps) waits while others train and goes on when its turn
    comes again. States given after an interruption go on where they stood: stages that
    they have behind them are left out, and batch k of a part is its k-th in any case.
    Give the rest that came with them, or that `after` returned last. If they stand at
    the end of a stage, `after` is called for it first, as the interruption may have
    come before it was.

    Args:
        steps: a part's step, from make_step, jitted with the state donated.
        states: a part's state; `params` of different parts share no leaf. Given up.
        batches: a part's function from its own count of steps to streams, such as
            data.table.batch_fn gives.
        stages: what trains, in order.
        rest: leaves that are in no part.
        ref: the reference model, if a term asks for it.
        hooks: as for fit; True ends everything, once `after` was called if it was a
            stage's last step.
        after: called when a stage is done with (its part, params of all parts and rest,
            rest); returns the rest to go on with, such as statistics measured anew.
            Called again on what it returned, it must return the same.
    Returns:
        (states, rest, log); log entries have the number of the `stage` and its `part`.
    Raises:
        KeyError: if a stage's part lacks a step, a state or batches.
        ValueError: for a stage without steps, or states that these stages, in this
            order, do not lead to.
        NotFinite: as fit, with the states of all parts and the rest.
    """
    states, log = dict(states), []
    for what, given in (("steps", steps), ("states", states), ("batches", batches)):
        parts = dict.fromkeys(stage.part for stage in stages)
        _checks.has_keys("fit_stages", what, parts, given, "Give one for every part.")
    done = {part: int(state.step) for part, state in states.items()}
    behind, begun = _in_order(stages, done)
    if after is not None and behind and not begun:
        rest = after(stages[behind - 1].part, _merged(states, rest), rest)
    ended = False

    def told(state, entry):
        nonlocal ended
        ended = any([hook(state, entry) for hook in hooks])
        return ended

    target = dict.fromkeys(states, 0)
    for number, (part, count) in enumerate(stages):
        target[part] += count
        if int(states[part].step) >= target[part]:
            continue
        frozen = _merged({k: v for k, v in states.items() if k != part}, rest)
        loader = map(batches[part], itertools.count(int(states[part].step)))
        try:
            states[part], new = fit(
                steps[part],
                states[part],
                loader,
                Frozen(frozen, ref),
                steps=target[part],
                hooks=[told],
            )
        except NotFinite as error:
            error.state, error.rest = {**states, part: error.state}, rest
            raise
        log += [{"stage": number, "part": part, **entry} for entry in new]
        if after is not None and int(states[part].step) == target[part]:
            rest = after(part, trees.merge(states[part].params, frozen), rest)
        if ended:
            break
    return states, rest, log


def _merged(states: Mapping[str, UnlearnState], rest: Params) -> Params | None:
    """Params of these parts and the rest; None if there are none."""
    halves = [state.params for state in states.values()]
    halves = [rest, *halves] if rest else halves
    return reduce(trees.merge, halves) if halves else None


def _in_order(stages: Sequence[Stage], done: Mapping[str, int]) -> tuple[int, int]:
    """(stages that states of these counts have behind them, steps of the next one).

    ValueError unless going through the stages in order leads to these counts.
    """
    left = dict(done)
    open_stage, behind, begun = False, 0, 0
    for part, count in stages:
        _checks.positive_int("A stage", steps=count)
        had = min(left[part], count)
        if open_stage and had:
            raise ValueError(
                f"fit_stages needs states that its stages lead to in order, got step "
                f"counts {dict(done)} for {[tuple(stage) for stage in stages][:6]}... "
                "Take the states and the stages of one run."
            )
        left[part] -= had
        if not open_stage:
            open_stage = had < count
            behind, begun = (behind, had) if open_stage else (behind + 1, 0)
    if any(left.values()):
        raise ValueError(
            f"fit_stages needs stages beyond its states, got step counts {dict(done)}, "
            "more than the stages have. Take the states and stages of one run."
        )
    return behind, begun


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
        tqdm = _checks.library("fit(progress=True)", "tqdm", "hf")
        self.bar = tqdm.tqdm(total=steps, initial=done, unit="step", dynamic_ncols=True)

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
