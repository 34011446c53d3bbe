# SPDX-License-Identifier: Apache-2.0
"""The loop: step numbers, log, hooks, short loaders and values that are not finite."""

import dataclasses
import functools
import itertools
import json
import math
import time
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from numpy.testing import assert_array_equal

import jaxunlearn as ju
from jaxunlearn import combine, sharding
from jaxunlearn.io import log, preempt
from jaxunlearn.typing import Frozen, Total
from tests import tiny


@dataclasses.dataclass(frozen=True)
class Pull:
    """mean over rows of (w - y)^2 / 2, and the largest draw of the step's key."""

    stream: str
    needs_ref: bool = False

    @property
    def reads(self):
        return (self.stream,)

    def __call__(self, params, streams, ref, key):
        y = streams[self.stream]
        count = jnp.int32(y.shape[0])
        error = 0.5 * jnp.sum((params["w"] - y) ** 2)
        draw = Total(jax.random.uniform(key, ()), jnp.int32(1))
        return Total(error, count), {"draw": draw}


def make(names=("forget", "retain")):
    tx = optax.chain(combine.weighted_sum(), optax.trace(0.9), optax.scale(-0.1))
    step = jax.jit(
        ju.make_step({name: Pull(name) for name in names}, tx), donate_argnums=0
    )
    params = {"w": jnp.array([1.0, -2.0, 0.5])}
    return step, ju.init_state(params, tx, jax.random.key(4))


def batch(number, bad=()):
    rng = np.random.default_rng(number)
    draws = rng.normal(size=(2, 5, 3)).astype(np.float32)
    streams = {"retain": draws[0], "forget": draws[1]}
    for name, at, value in bad:
        if number == at:
            streams[name][2, 1] = value
    return streams


def loader(first=0, stop=None, bad=()):
    numbers = itertools.count(first) if stop is None else range(first, stop)
    return (batch(number, bad) for number in numbers)


def run(steps, **kwargs):
    step, state = make()
    return ju.fit(step, state, loader(), steps=steps, **kwargs)


def identical(actual, expected):
    def compare(a, b):
        if jnp.issubdtype(a.dtype, jax.dtypes.prng_key):
            a, b = jax.random.key_data(a), jax.random.key_data(b)
        assert a.dtype == b.dtype
        assert_array_equal(a, b)

    jax.tree.map(compare, actual, expected)


def test_the_log_holds_plain_numbers():
    state, entries = run(3)
    assert int(state.step) == 3
    assert [entry["step"] for entry in entries] == [0, 1, 2]
    names = {"step", "seconds", "finite"}
    for term in ("forget", "retain"):
        names |= {f"{term}/{what}" for what in ("loss", "grad_norm", "draw")}
    for entry in entries:
        assert set(entry) == names
        assert type(entry["step"]) is int and type(entry["finite"]) is bool
        floats = [v for k, v in entry.items() if k not in ("step", "finite")]
        assert {type(value) for value in floats} == {float}
        assert entry["seconds"] > 0
        assert json.loads(json.dumps(entry)) == entry
    first = batch(0)["forget"]
    loss = 0.5 * ((np.array([1.0, -2.0, 0.5]) - first) ** 2).sum() / len(first)
    assert entries[0]["forget/loss"] == pytest.approx(loss, rel=1e-5)


def test_step_numbers_continue_from_the_state():
    step, state = make()
    state, first = ju.fit(step, state, loader(), steps=2)
    state, second = ju.fit(step, state, loader(first=2), steps=5)
    expected, entries = run(5)
    assert [entry["step"] for entry in second] == [2, 3, 4]
    identical(state, expected)
    for one, other in zip([*first, *second], entries, strict=True):
        assert one | {"seconds": 0} == other | {"seconds": 0}
    before = jax.tree.map(jnp.copy, state)
    state, entries = ju.fit(step, state, loader(), steps=5)  # nothing left to do
    assert entries == []
    identical(state, before)


def test_the_loader_yields_only_the_batches_that_are_used():
    step, state = make()
    numbers = loader(stop=4)
    ju.fit(step, state, numbers, steps=3)
    assert len(list(numbers)) == 1


def test_frozen_reaches_the_step():
    step, state = make()
    seen = []

    def spy(state, streams, frozen):
        seen.append(frozen)
        return step(state, streams, frozen)

    frozen = Frozen(ref_params={"w": jnp.zeros(3)})
    ju.fit(spy, state, loader(), frozen, steps=1)
    ju.fit(spy, make()[1], loader(), steps=1)
    assert seen[0] is frozen and seen[1] == Frozen()


@pytest.mark.parametrize("progress", [False, True])
def test_hooks_are_called_in_order_and_any_of_them_stops(progress):
    calls = []

    def hook(name, stop):
        def call(state, entry):
            calls.append((name, int(state.step), entry["step"]))
            return entry["step"] == stop

        return call

    hooks = [hook("a", 1), hook("b", 7), lambda *_: None]
    state, entries = run(6, hooks=hooks, progress=progress)
    assert int(state.step) == len(entries) == 2
    # The hook that stops does not keep the others from seeing the last step.
    assert calls == [("a", 1, 0), ("b", 1, 0), ("a", 2, 1), ("b", 2, 1)]


def test_a_loader_that_ends_too_early_is_an_error():
    step, state = make()
    message = "for each of 5 steps, but the loader ended before step 2"
    with pytest.raises(ValueError, match=message) as caught:
        ju.fit(step, state, loader(stop=2), steps=5)
    assert caught.value.__suppress_context__  # no StopIteration above the message
    with pytest.raises(ValueError, match="steps >= 0, got steps=-1"):
        ju.fit(*make(), loader(), steps=-1)


@pytest.mark.parametrize("value", [np.nan, np.inf, 1e30], ids=["nan", "inf", "1e30"])
@pytest.mark.parametrize("term", ["forget", "retain"])
def test_a_value_that_is_not_finite_stops_the_run(term, value):
    step, state = make()
    bad = [(term, 3, value)]
    with pytest.raises(ju.NotFinite) as caught:
        ju.fit(step, state, loader(bad=bad), steps=6)
    error, message = caught.value, str(caught.value)
    expected, entries = run(3)
    assert error.step == 3 and error.term == term
    identical(error.state, expected)
    assert int(error.state.step) == 3
    assert len(error.log) == 4 and not error.log[3]["finite"]
    for one, other in zip(error.log, entries, strict=False):
        assert one | {"seconds": 0} == other | {"seconds": 0}
    assert not math.isfinite(error.log[3][f"{term}/loss"])
    assert message.startswith("Step 3 ") and f"term {term!r}" in message
    assert f"{term}/loss={error.log[3][f'{term}/loss']}" in message
    assert "lower the learning rate" in message
    # The state can go on, over other data.
    state, entries = ju.fit(step, error.state, loader(first=3), steps=5)
    identical(state, run(5)[0])


def test_a_progress_bar_writes_to_standard_error_alone(capsys):
    state, _ = run(3, progress=True)
    out, err = capsys.readouterr()
    assert out == ""
    assert "3/3" in err and "forget=" in err and "retain=" in err
    identical(state, run(3)[0])
    assert capsys.readouterr() == ("", "")
    step, state = make()
    with pytest.raises(ju.NotFinite):
        ju.fit(step, state, loader(bad=[("forget", 1, np.nan)]), steps=3, progress=True)
    assert capsys.readouterr().err.endswith("\n")  # the bar was closed


def test_json_lines_have_every_metric(tmp_path):
    path = tmp_path / "new" / "folders" / "metrics.jsonl"
    _, entries = run(3, hooks=[log.JsonLines(path)])
    assert [json.loads(line) for line in path.read_text().splitlines()] == entries


def test_json_lines_write_null_for_nan_and_infinity(tmp_path):
    hook = log.JsonLines(tmp_path / "a.jsonl")
    entry = {"step": 1, "a": math.nan, "b": math.inf, "c": -math.inf, "finite": False}
    assert hook(None, entry) is None
    (line,) = hook.path.read_text().splitlines()

    def refuse(name):
        raise AssertionError(f"{name} is no JSON")

    read = json.loads(line, parse_constant=refuse)
    assert read == {"step": 1, "a": None, "b": None, "c": None, "finite": False}


def test_json_lines_start_again_or_append(tmp_path):
    path = tmp_path / "metrics.jsonl"
    for append, expected in ((False, 2), (True, 4), (False, 2)):
        run(2, hooks=[log.JsonLines(path, append=append)])
        assert len(path.read_text().splitlines()) == expected


def test_json_lines_survive_a_killed_run(tmp_path):
    path = tmp_path / "metrics.jsonl"
    seen = []

    def reads(state, entry):
        seen.append(len(path.read_text().splitlines()))  # flushed at once

    step, state = make()
    hooks = [log.JsonLines(path), reads]
    with pytest.raises(ju.NotFinite) as caught:
        ju.fit(step, state, loader(bad=[("retain", 3, np.nan)]), steps=6, hooks=hooks)
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert seen == [1, 2, 3, 4]
    assert lines[:3] == caught.value.log[:3]
    assert lines[3]["step"] == 3 and lines[3]["finite"] is False


def does_not_read(hook):
    hook.reads_state = False
    return hook


def spied(monkeypatch, step):
    """(the step, the order in which steps were started and their metrics read)."""
    events, get = [], jax.device_get

    @functools.wraps(step)  # with its attributes
    def run(*args, **kwargs):
        events.append("start")
        return step(*args, **kwargs)

    def read(x):
        if "finite" in x:
            events.append("read")
        return get(x)

    monkeypatch.setattr(jax, "device_get", read)
    return run, events


@pytest.mark.parametrize("hooks", [[], [does_not_read(lambda *_: None)]])
def test_metrics_are_read_while_the_next_step_runs(monkeypatch, hooks):
    expected, entries = run(4, hooks=[lambda *_: None])
    step, state = make()
    step, events = spied(monkeypatch, step)
    state, log = ju.fit(step, state, loader(), steps=4, hooks=hooks)
    # One read a step, and but for the last one a later step was started before it.
    assert events == ["start", "start", "read", *["start", "read"] * 2, "read"]
    identical(state, expected)
    for one, other in zip(log, entries, strict=True):
        assert one | {"seconds": 0} == other | {"seconds": 0}


def test_the_loop_waits_for_the_steps_whose_state_a_hook_reads(monkeypatch):
    step, state = make()
    step, events = spied(monkeypatch, step)
    seen = []

    def every_second(state, entry):
        seen.append((entry["step"], state is not None))
        assert state is None or int(state.step) == entry["step"] + 1

    every_second.reads_state = lambda number: number % 2 == 1
    hooks = [does_not_read(lambda *_: None), every_second]
    ju.fit(step, state, loader(), steps=5, hooks=hooks)
    wait_for_the_second = ["start", "start", "read", "read"]
    assert events == [*wait_for_the_second * 2, "start", "read"]
    assert seen == [(0, False), (1, True), (2, False), (3, True), (4, True)]
    events.clear()
    ju.fit(step, make()[1], loader(), steps=3, hooks=[lambda *_: None])
    assert events == ["start", "read"] * 3


def test_a_stop_by_a_hook_that_does_not_read_the_state_waits_for_the_next_step():
    seen = []

    def stop_at_the_second(state, entry):
        seen.append(entry["step"])
        return entry["step"] == 1

    hooks = [does_not_read(stop_at_the_second)]
    state, entries = run(6, hooks=hooks)
    identical(state, run(3)[0])
    assert seen == [entry["step"] for entry in entries] == [0, 1, 2]


@pytest.mark.parametrize("at", [0, 2, 5], ids=["first", "third", "last"])
def test_hooks_see_a_failed_step_and_nothing_later_changes_the_state(at):
    seen = []
    hooks = [does_not_read(lambda _, entry: seen.append(entry["finite"]))]
    step, state = make()
    with pytest.raises(ju.NotFinite) as caught:
        bad = [("forget", at, np.inf), ("retain", at + 1, np.nan)]
        ju.fit(step, state, loader(bad=bad), steps=6, hooks=hooks)
    assert seen == [True] * at + [False]
    assert caught.value.step == at and len(caught.value.log) == at + 1
    identical(caught.value.state, run(at)[0])


def test_an_error_of_the_loader_comes_after_the_entries_of_all_steps():
    seen = []
    hooks = [does_not_read(lambda _, entry: seen.append(entry["step"]))]
    step, state = make()
    with pytest.raises(ValueError, match="ended before step 2"):
        ju.fit(step, state, loader(stop=2), steps=5, hooks=hooks)
    assert seen == [0, 1]
    with pytest.raises(ju.NotFinite):  # the step before, which ended first
        bad = [("forget", 1, np.nan)]
        ju.fit(step, make()[1], loader(stop=2, bad=bad), steps=5, hooks=hooks)


def test_a_step_is_compiled_once_also_on_a_mesh():
    step, state = make()
    with tiny.compilations() as compiled:
        state, _ = ju.fit(step, state, loader(), steps=3)
        ju.fit(step, state, loader(), steps=6)
    assert sum("step" in name for name in compiled) == 1
    mesh = sharding.make_mesh(fsdp=5, devices=jax.devices()[:5])
    rules = ((r".*", ()),)
    terms, tx = {"forget": Pull("forget")}, combine.weighted_sum()
    tx = optax.chain(tx, optax.scale(-0.1))
    params = {"w": jnp.array([1.0, -2.0, 0.5])}
    fresh = partial(ju.init_state, tx=tx)
    state = sharding.create(fresh, mesh, rules, params, key=jax.random.key(0))
    step = sharding.jit_step(ju.make_step(terms, tx), mesh, rules, state)
    with tiny.compilations() as compiled:
        ju.fit(step, state, loader(), steps=3)
    assert sum("step" in name for name in compiled) == 1


def test_seconds_add_up_to_the_time_of_the_loop():
    begin = time.perf_counter()
    _, entries = run(5)
    assert 0 < sum(x["seconds"] for x in entries) <= time.perf_counter() - begin


def test_the_hook_of_checkpoints_waits_for_regular_steps_and_after_a_signal(
    monkeypatch,
):
    saved, taken, signal = [], [], []

    def save(_, done, state, *, data, config):
        saved.append((done, int(state.step), data))

    def counted():
        for number in itertools.count():
            taken.append(number)
            yield batch(number)

    def arrives(_, entry):
        if entry["step"] == 3:
            signal.append("SIGTERM")

    monkeypatch.setattr(preempt.checkpoint, "save", save)
    hook = preempt.hook(
        None, every=3, steps=9, stop=lambda: bool(signal), data=lambda _: len(taken)
    )
    step, state = make()
    step, events = spied(monkeypatch, step)
    hooks = [does_not_read(arrives), hook]
    state, entries = ju.fit(step, state, counted(), steps=9, hooks=hooks)
    # The signal came while the fifth step ran, which is saved, and so is the position
    # of the loader after as many batches.
    assert saved == [(3, 3, 3), (5, 5, 5)]
    assert int(state.step) == len(entries) == 5
    assert events[:6] == ["start", "start", "read", "start", "read", "read"]
