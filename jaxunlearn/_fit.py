# SPDX-License-Identifier: Apache-2.0
"""The Python loop around a step: it reads batches, runs the step, and logs metrics."""

import itertools
import time
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import reduce
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxunlearn import _checks, _precision, trees
from jaxunlearn._step import SWALLOWED, Step, UnlearnState
from jaxunlearn.typing import Frozen, Params, Streams

MAX_SWALLOWED = 0.1  # share of an update that may be lost without a warning

Entry = Mapping[str, float | int]
Hook = Callable[[UnlearnState | None, Entry], bool | None]
"""Called after every step, also after a failed one, with the state and the log entry.
If it returns True, the run stops. The state's buffers are donated to the next step, so
a hook that stores one must copy it.

`fit` waits for a step before it starts the next one if a hook reads the state. A hook
that does not read it has the attribute `reads_state = False`, or a function from the
step's number to whether it reads the state after that step. Where no hook reads the
state, the next step already runs when the hooks are called: the state that they get is
None, and if one of them returns True, the run stops after that next step, whose entry
they get too."""


class NotFinite(FloatingPointError):
    """A loss or a gradient was not finite, and the step updated nothing.

    Attributes:
        state: the last finite state (of `fit_stages`, the states of all parts).
        frozen_params: of `fit_stages`, those to resume with; else None.
        log: entries of all steps, the failed one included.
        step: the failed step's number, from 0.
        term: the term that was not finite.
    """

    def __init__(
        self, message: str, state: UnlearnState, log: list, step: int, term: str
    ):
        super().__init__(message)
        self.state, self.log, self.step, self.term = state, log, step, term
        self.frozen_params: Params = None


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

    The state counts its updates: a state restored after 30 updates continues with the
    31st, so the loader must continue there too (data.streams has `skip`, a data.loader
    its set_state).

    The loop does not wait for a step before it starts the next one: the metrics of a
    step are read while the next one runs, and its batch is read and copied to the
    device by then. The next step changes nothing if the metrics turn out not to be
    finite. The loop waits where a hook reads the state (see `Hook`) and for a `step`
    that does not take `enabled` (see `make_step`).

    Args:
        step: from make_step, jitted with the state donated.
        state: the state to begin with; its buffers are donated.
        loader: yields streams of NumPy or JAX arrays, at least one for each step. When
            NotFinite is raised, one batch more may have been taken.
        frozen: what the step reads and never changes.
        steps: total number of updates, including those that `state` already has.
        hooks: called in order after every step.
        progress: whether to show a progress bar (on standard error).
    Returns:
        (state, log); each log entry holds `step`, `seconds` (from the end of the step
        before, or from this step's start if that is later, to this step's end) and
        every metric as a number.
    Raises:
        ValueError: if the loader ends too early, or a batch has token ids outside the
            model's vocabulary or rows that are not pairs where a term reads pairs.
        NotFinite: at the first loss or gradient that is not finite; it carries the last
            finite state.
    Warns:
        UserWarning: at the first step of which rounding to the dtype of the params
            swallowed more than a tenth of the update.
    """
    _checks.not_negative("fit", steps=steps)
    check = getattr(step, "check", lambda streams: None)
    ahead = getattr(step, "takes_enabled", False)
    # Computed from the state, so that it is placed as the metrics are.
    enabled = {"enabled": jnp.asarray(state.step) >= 0} if ahead else {}
    batches, first = iter(loader), int(state.step)
    read = _Reader(hooks, _Bar(steps, first) if progress else None)
    started: _Started | None = None  # a step whose metrics were not read
    try:
        for number in range(first, steps):
            try:
                streams = _next(batches, number, steps)
                check(streams)
            except Exception:
                if started:
                    read(started, state, state)
                raise
            start = time.perf_counter()
            state, metrics = step(state, streams, frozen, **enabled)
            before, started = started, _Started(number, start, metrics)
            if ahead:
                enabled = {"enabled": metrics["finite"]}
            stop = before is not None and read(before, state, None)
            if stop or not ahead or any(_reads_state(hook, number) for hook in hooks):
                now, started = started, None
                if read(now, state, state) or stop:
                    break
        if started:
            read(started, state, state)
    finally:
        read.close()
    return state, read.log


class _Started(NamedTuple):
    """A step that was started.

    Attributes:
        number: of the step, from 0.
        start: time.perf_counter() at its start.
        metrics: its metrics, on the device.
    """

    number: int
    start: float
    metrics: Mapping[str, Any]


class _Reader:
    """Reads the metrics of a step into the log, and passes them on.

    Attributes:
        log: the entries of all steps that were read.
    """

    def __init__(self, hooks: Sequence[Hook], bar: "_Bar | None"):
        self.log: list[dict[str, Any]] = []
        self._hooks, self._bar = hooks, bar
        self._end, self._warned = 0.0, False

    def __call__(
        self, step: _Started, state: UnlearnState, shown: UnlearnState | None
    ) -> bool:
        """Whether a hook stops the run; waits until the step is done.

        Args:
            step: the step.
            state: the newest state. It is that after the step, or after a later step
                that was enabled by this one.
            shown: the state that hooks get.
        Raises:
            NotFinite: if the step was not.
        """
        metrics = {
            k: np.asarray(v).item() for k, v in jax.device_get(step.metrics).items()
        }
        end = time.perf_counter()
        seconds, self._end = end - max(step.start, self._end), end
        entry = {"step": step.number, "seconds": seconds, **metrics}
        self.log.append(entry)
        if not self._warned and entry.get(SWALLOWED, 0.0) > MAX_SWALLOWED:
            warn_of_rounding(state.params, entry[SWALLOWED], step.number, stacklevel=4)
            self._warned = True
        stop = any([hook(shown, entry) for hook in self._hooks])
        if not entry.get("finite", True):
            _not_finite(state, self.log, entry)
        if self._bar:
            self._bar.update(entry)
        return stop

    def close(self) -> None:
        if self._bar:
            self._bar.close()


def _reads_state(hook: Hook, number: int) -> bool:
    """Whether a hook reads the state after this step, as it says."""
    reads = getattr(hook, "reads_state", True)
    return bool(reads(number) if callable(reads) else reads)


class Stage(NamedTuple):
    """A number of updates of one part of the params; the other parts do not change."""

    part: str
    steps: int


def fit_stages(
    steps: Mapping[str, Step],
    states: Mapping[str, UnlearnState],
    batches: Mapping[str, Callable[[int], Streams]],
    stages: Sequence[Stage],
    frozen: Frozen = Frozen(),
    *,
    hooks: Sequence[Hook] = (),
    after: Callable[[str, Params, Params], Params] | None = None,
) -> tuple[dict[str, UnlearnState], Frozen, list[dict[str, Any]]]:
    """Trains the parts of a model in turns, each with a separate optimizer state.

    In a stage the leaves of one part train and all others are frozen. The state of a
    part (moments, number of updates) is saved while other parts train and used again in
    its next stage.

    To resume, pass the saved states and the saved `frozen`. Stages that these states
    have already completed are skipped, and update k of a part always takes its k-th
    batch. `after` must be idempotent: it runs again if the run stopped right after a
    stage.

    Args:
        steps: part -> its step, from make_step, jitted with the state donated.
        states: part -> its state, which is donated; no leaf is in two parts.
        batches: part -> function from its number of updates to streams, such as
            data.table.batch_fn gives.
        stages: what trains, in order.
        frozen: the leaves that are in no part, and the reference model where a term
            needs it.
        hooks: as for fit; if one returns True, everything stops, after `after` ran if
            that step was the last of its stage.
        after: called when a stage is complete, with (part, params of the whole model,
            frozen.params); returns the new frozen.params, such as batch statistics that
            were measured again.
    Returns:
        (states, frozen, log); log entries have the number of the `stage` and its
        `part`.
    Raises:
        KeyError: if a stage's part has no step, no state or no batches.
        ValueError: for a stage without steps, or for states that these stages cannot
            have reached in this order.
        NotFinite: as fit, with the states of all parts and frozen_params.
    """
    rest, ref_params = frozen
    states, log = dict(states), []
    for what, given in (("steps", steps), ("states", states), ("batches", batches)):
        parts = dict.fromkeys(stage.part for stage in stages)
        _checks.has_keys("fit_stages", what, parts, given, "Give one for every part.")
    done = {part: int(state.step) for part, state in states.items()}
    behind, begun = _in_order(stages, done)
    if after is not None and behind and not begun:
        rest = after(stages[behind - 1].part, _merged(states, rest), rest)
    ended = False

    def stop(state, entry):
        nonlocal ended
        ended |= any([hook(state, entry) for hook in hooks])
        return ended

    stop.reads_state = lambda number: any([_reads_state(h, number) for h in hooks])
    target = dict.fromkeys(states, 0)
    for number, (part, count) in enumerate(stages):
        target[part] += count
        if int(states[part].step) >= target[part]:
            continue
        others = _merged({k: v for k, v in states.items() if k != part}, rest)
        loader = map(batches[part], itertools.count(int(states[part].step)))
        try:
            states[part], new = fit(
                steps[part],
                states[part],
                loader,
                Frozen(others, ref_params),
                steps=target[part],
                hooks=[stop],
            )
        except NotFinite as error:
            error.state, error.frozen_params = {**states, part: error.state}, rest
            raise
        log += [{"stage": number, "part": part, **entry} for entry in new]
        if after is not None and int(states[part].step) == target[part]:
            rest = after(part, trees.merge(states[part].params, others), rest)
        if ended:
            break
    return states, Frozen(rest, ref_params), log


def _merged(states: Mapping[str, UnlearnState], rest: Params) -> Params | None:
    """The params of these parts together with `rest`; None if there are none."""
    halves = [state.params for state in states.values()]
    halves = [rest, *halves] if rest else halves
    return reduce(trees.merge, halves) if halves else None


def _in_order(stages: Sequence[Stage], done: Mapping[str, int]) -> tuple[int, int]:
    """(number of completed stages, updates done in the next one) for these counts.

    Raises ValueError unless the stages in this order can lead to these counts.
    """
    left = dict(done)
    open_stage, behind, begun = False, 0, 0
    for part, count in stages:
        _checks.positive_int("A stage", steps=count)
        had = min(left[part], count)
        if open_stage and had:
            raise ValueError(
                f"fit_stages needs states that its stages can reach in order, got step "
                f"counts {dict(done)} for {[tuple(stage) for stage in stages][:6]}... "
                "Pass the states and the stages of one run."
            )
        left[part] -= had
        if not open_stage:
            open_stage = had < count
            behind, begun = (behind, had) if open_stage else (behind + 1, 0)
    if any(left.values()):
        raise ValueError(
            f"fit_stages needs states with at most the steps of its stages, got step "
            f"counts {dict(done)}. Pass the states and the stages of one run."
        )
    return behind, begun


def _next(batches, number: int, steps: int) -> Streams:
    try:
        return next(batches)
    except StopIteration:
        raise ValueError(
            f"fit needs a batch for each of {steps} steps, but the loader ended before "
            f"step {number}. Use more epochs, or fewer steps."
        ) from None


def _not_finite(state, log, entry):
    bad = [name for name, value in entry.items() if not np.isfinite(value)]
    term = bad[0].split("/")[0] if bad else "the combiner"
    what = ", ".join(f"{name}={entry[name]}" for name in bad) or "the combined update"
    raise NotFinite(
        f"Step {entry['step']} needs finite losses and gradients, got {what} from term "
        f"{term!r}. The update was skipped; the attribute `state` has the last finite "
        "state. Check that batch, lower the learning rate, or bound the loss (npo in "
        "place of ascent).",
        state,
        log,
        entry["step"],
        term,
    )


def warn_of_rounding(
    params: Params, share: float, step: int, *, stacklevel: int
) -> None:
    """Warns that rounding to the dtype of the params swallowed this share of the update
    of a step."""
    leaves = jax.tree.leaves(params)
    low = sorted({str(x.dtype) for x in leaves if _precision.is_low(x)})
    warnings.warn(
        f"Rounding to {', '.join(low)} swallowed {share:.0%} of the update at step "
        f"{step} (metric {SWALLOWED!r}): the params train less than the learning rate "
        "says. Store the params that train in float32, or set rounding to 'stochastic' "
        "or 'masters' (Recipe.setup, combine.with_rounding, --rounding).",
        stacklevel=stacklevel,
    )


class _Bar:
    """A progress bar that shows each term's loss."""

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
