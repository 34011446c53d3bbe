# SPDX-License-Identifier: Apache-2.0
"""Staged unlearning: only one part changes, three optimizer states, resuming."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_array_equal

import jaxunlearn as ju
from jaxunlearn import trees
from jaxunlearn._fit import NotFinite, Stage, fit_stages
from jaxunlearn.data import images, table
from jaxunlearn.io import checkpoint
from jaxunlearn.models import vision
from jaxunlearn.recipes import condensation
from jaxunlearn.recipes.condensation import PARTS, STREAMS

KEY = jax.random.key(0)
CONFIG = vision.VisionConfig("cnn", shape=(16, 16, 1), classes=4, width=0.03)


@pytest.fixture(autouse=True)
def adam_promotes():
    with jax.numpy_dtype_promotion("standard"):
        yield


def tiny_images(rows, seed):
    rng = np.random.default_rng(seed)
    pixels = rng.integers(0, 256, (rows, 16, 16, 1), np.uint8)
    return images.table(pixels, np.arange(rows) % 4, classes=4)


class Run:
    """A plan of two rounds on a tiny network, with all that fit_stages takes."""

    def __init__(self, **settings):
        self.nets = {part: vision.make(CONFIG, train_parts=(part,)) for part in PARTS}
        how = dict(rounds=2, threshold=1, final_steps=2, learning_rate=1e-2) | settings
        self.plan = condensation.unlearn(self.nets, **how)
        self.params = self.nets["begin"].init(KEY)
        data = {"reduced": tiny_images(12, 0), "kept": tiny_images(8, 1)}
        self.rest = trees.split(self.params, r"batch_stats/.*")[0]
        self.states, self.steps, self.batches = {}, {}, {}
        for part, recipe in self.plan.parts.items():
            made = recipe.setup(self.nets[part], self.params, key=KEY)
            self.steps[part], self.states[part], _ = made
            stream = STREAMS[part]
            self.batches[part] = table.batch_fn({stream: data[stream]}, 4, seed=0)

    def fit(self, stages=None, states=None, rest=None, **how):
        stages = self.plan.stages(3) if stages is None else stages
        states = jax.tree.map(jnp.copy, self.states if states is None else states)
        rest = self.rest if rest is None else rest
        frozen = ju.Frozen(rest)
        states, frozen, log = fit_stages(
            self.steps, states, self.batches, stages, frozen, **how
        )
        return states, frozen.params, log

    def measured(self, part, params, rest):
        """For `after`: the rest with the statistics of the part that trained."""
        data = [self.batches[part](number)[STREAMS[part]] for number in (0, 1)]
        new = vision.with_batch_stats(self.nets[part], params, data)
        return {**rest, "batch_stats": new["batch_stats"]}


def bits(leaf):
    return np.asarray(leaf).tobytes()


def merged(states, rest):
    for state in states.values():
        rest = trees.merge(rest, state.params)
    return rest


def test_the_stages_are_those_of_the_paper():
    nets = {part: vision.make(CONFIG, train_parts=(part,)) for part in PARTS}
    how = dict(rounds=2, final_steps=2, learning_rate=1e-2)
    plan = condensation.unlearn(nets, threshold=1, **how)
    wanted = [("begin", 3), ("final", 2), ("begin", 3), ("middle", 3)]
    assert [tuple(stage) for stage in plan.stages(3)] == wanted
    # The released numbers for a class: the threshold exceeds the rounds.
    never = condensation.unlearn(nets, threshold=25, **how).stages(3)
    assert [stage.part for stage in never] == ["begin", "begin", "middle"]


@pytest.mark.parametrize("part", PARTS)
def test_a_stage_changes_every_leaf_of_its_part_and_no_other(part):
    run = Run()
    states, rest, log = run.fit([Stage(part, 2)])
    before, after = (trees.paths(x) for x in (run.params, merged(states, rest)))
    assert before.keys() == after.keys()
    for path, leaf in before.items():
        same = np.asarray(leaf).tobytes() == np.asarray(after[path]).tobytes()
        # The biases before a ReLU that is dead may stay; kernels may not.
        assert same or path.startswith(f"{part}/"), path
        assert not (same and path.startswith(f"{part}/") and "kernel" in path), path
    for name in set(PARTS) - {part}:
        pair = map(jax.tree.leaves, (run.states[name], states[name]))
        for a, b in zip(*pair, strict=True):
            if not jnp.issubdtype(a.dtype, jax.dtypes.prng_key):
                assert_array_equal(a, b)
    assert [(entry["stage"], entry["part"]) for entry in log] == [(0, part)] * 2


def test_optimizer_states_persist_across_stages():
    run = Run()
    states, _, log = run.fit()
    assert {part: int(state.step) for part, state in states.items()} == {
        "begin": 6,
        "middle": 3,
        "final": 2,
    }
    counts = {part: _adam_count(state) for part, state in states.items()}
    assert counts == {"begin": 6, "middle": 3, "final": 2}
    # Fresh moments in the second begin stage would give other weights.
    first, rest, _ = run.fit([Stage("begin", 3), Stage("final", 2)])
    recipe = run.plan.parts["begin"]
    fresh = ju.init_state(first["begin"].params, recipe.tx, KEY)
    first["begin"] = first["begin"].replace(opt_state=fresh.opt_state)
    other, *_ = run.fit(states=first)
    moved = jax.tree.map(
        lambda a, b: bool((a != b).any()), other["begin"].params, states["begin"].params
    )
    assert any(jax.tree.leaves(moved))


def _adam_count(state):
    found = [
        int(leaf)
        for path, leaf in trees.paths(state.opt_state).items()
        if path.endswith("count")
    ]
    return max(found)


# A step within a stage and the last step of one; all others are slow.
STOPS = [
    x if x in (2, 3) else pytest.param(x, marks=pytest.mark.slow) for x in range(1, 12)
]


@pytest.mark.parametrize("stop", STOPS)
def test_an_interrupted_run_resumes_bit_for_bit(stop):
    run = Run()
    whole_run, rest, log = run.fit()
    seen = []

    def interrupt(state, entry):
        seen.append(entry)
        return len(seen) == stop

    half, _, first = run.fit(hooks=[interrupt])
    assert len(first) == stop
    end, _, second = run.fit(states=half)
    assert [e["retain/loss"] for e in (*first, *second)] == [
        e["retain/loss"] for e in log
    ]
    pair = jax.tree.leaves(merged(whole_run, rest)), jax.tree.leaves(merged(end, rest))
    for a, b in zip(*pair, strict=True):
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()
    assert run.fit(states=end)[2] == []


@pytest.mark.slow
def test_an_interrupted_run_resumes_from_a_checkpoint(tmp_path):
    run = Run()
    whole_run, rest, _ = run.fit()
    half, _, _ = run.fit(hooks=[lambda state, entry: entry["step"] == 4])
    assert {part: int(state.step) for part, state in half.items()} == {
        "begin": 5,
        "middle": 0,
        "final": 2,
    }
    shapes = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), half
    )
    saved = checkpoint.open(tmp_path / "c")
    checkpoint.save(saved, 7, half)
    checkpoint.close(saved)
    found = checkpoint.restore(checkpoint.open(tmp_path / "c"), shapes)
    end, _, log = run.fit(states=found.state)
    assert len(log) == 4
    pair = jax.tree.leaves(merged(whole_run, rest)), jax.tree.leaves(merged(end, rest))
    for a, b in zip(*pair, strict=True):
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


def test_the_offline_stage_alternates_and_does_not_train_begin():
    run = Run()
    nets = {
        part: vision.make(CONFIG, train_parts=(part,)) for part in ("middle", "final")
    }
    plan = condensation.offline(
        nets, rounds=2, epochs=1, learning_rate=1e-2, middle_learning_rate=1e-2
    )
    stages = plan.stages(2, 3)
    pair = [("final", 2), ("middle", 3)]
    assert [tuple(stage) for stage in stages] == pair * 2
    run.batches["middle"] = table.batch_fn({"all": tiny_images(12, 0)}, 4, seed=0)
    for part, recipe in plan.parts.items():
        step = ju.make_step(recipe.terms, recipe.tx)
        run.steps[part] = jax.jit(step, donate_argnums=0)
    states, rest, log = run.fit(stages)
    assert len(log) == 10
    moved = merged(states, rest)
    jax.tree.map(assert_array_equal, moved["begin"], run.params["begin"])
    kernel = "final", "head", "kernel"
    before, after = run.params, moved
    for key in kernel:
        before, after = before[key], after[key]
    assert (before != after).any()


def test_after_may_change_the_frozen_params():
    run, calls = Run(), []

    def after(part, params, rest):
        calls.append((part, set(params)))
        return jax.tree.map(lambda x: x + 1, rest)

    _, rest, _ = run.fit([Stage("begin", 1), Stage("final", 1)], after=after)
    leaves = {"begin", "middle", "final", "batch_stats"}
    assert calls == [("begin", leaves), ("final", leaves)]
    jax.tree.map(lambda a, b: assert_array_equal(a, b + 2), rest, run.rest)


@pytest.fixture(scope="module")
def measuring():
    """A run that measures statistics after every stage, and how it ends."""
    run = Run()
    with jax.numpy_dtype_promotion("standard"):
        states, rest, log = run.fit(after=run.measured)
    return run, merged(states, rest), log


@pytest.mark.parametrize("how", ["stopped", "killed"])
@pytest.mark.parametrize("stop", range(1, 12))
def test_after_runs_for_every_stage_of_an_interrupted_run(measuring, stop, how):
    run, wanted, log = measuring
    entries, states, rest = [], dict(run.states), [run.rest]

    def hook(state, entry):
        entries.append(entry)
        if len(entries) == stop and how == "stopped":
            return True
        part = next(name for name in PARTS if jax.tree.leaves(state.params[name]))
        states[part] = jax.tree.map(jnp.copy, state)
        if len(entries) == stop:
            raise KeyboardInterrupt

    def after(part, params, old):
        rest.append(run.measured(part, params, old))
        return rest[-1]

    try:
        states, last, _ = run.fit(hooks=[hook], after=after)
        rest.append(last)
    except KeyboardInterrupt:
        assert how == "killed"
    assert len(entries) == stop
    end, last, more = run.fit(states=states, rest=rest[-1], after=run.measured)
    assert [e["retain/loss"] for e in (*entries, *more)] == [
        e["retain/loss"] for e in log
    ]
    pair = jax.tree.leaves(wanted), jax.tree.leaves(merged(end, last))
    assert [bits(a) == bits(b) for a, b in zip(*pair, strict=True)].count(False) == 0


def test_measured_statistics_change_only_in_the_part_that_trained():
    run, key = Run(), np.random.default_rng(0)

    def drawn(path, leaf):
        sign = -1 if path.endswith("mean") else 1  # so that the ReLUs are awake
        return jnp.asarray(sign * key.uniform(0.1, 3, leaf.shape), leaf.dtype)

    stats = run.params["batch_stats"]
    run.rest["batch_stats"] = trees.map_with_path(drawn, stats)
    stats, parts = [run.rest["batch_stats"]], []

    def after(part, params, rest):
        rest = run.measured(part, params, rest)
        stats.append(rest["batch_stats"])
        parts.append(part)
        return rest

    run.fit(after=after)
    assert parts == ["begin", "final", "begin", "middle"]
    for part, old, new in zip(parts, stats[:-1], stats[1:], strict=True):
        assert old.keys() == new.keys() == {"begin", "middle"}
        for name in old:
            pair = jax.tree.leaves(old[name]), jax.tree.leaves(new[name])
            same = [bits(a) == bits(b) for a, b in zip(*pair, strict=True)]
            assert all(same) == (name != part), (part, name)


def test_not_finite_carries_the_states_of_all_parts():
    run = Run()
    good = run.batches["final"]

    def bad(number):
        streams = good(number)
        pixels = images.as_float(streams["kept"])
        return {"kept": {**pixels, "image": pixels["image"] * np.nan}}

    run.batches["final"] = bad
    with pytest.raises(NotFinite) as error:
        run.fit()
    assert {p: int(s.step) for p, s in error.value.state.items()} == {
        "begin": 3,
        "middle": 0,
        "final": 0,
    }
    assert error.value.frozen_params is run.rest


def test_states_that_the_stages_cannot_reach_are_refused():
    run = Run()
    states, *_ = run.fit([Stage("middle", 1)])
    with pytest.raises(ValueError, match="step counts"):
        run.fit(states=states)
    with pytest.raises(ValueError, match="step counts"):
        run.fit([Stage("begin", 1)], states=states)
    with pytest.raises(ValueError, match="steps >= 1, got steps=0"):
        run.fit([Stage("begin", 0)])
    with pytest.raises(KeyError, match="reads steps 'head'"):
        run.fit([Stage("head", 1)])
    with pytest.raises(KeyError, match="Make one for every part"):
        condensation.unlearn({"begin": vision.make(CONFIG)})
