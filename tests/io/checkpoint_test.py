# SPDX-License-Identifier: Apache-2.0
"""Checkpoints: complete or absent, on any mesh, and never those of another run."""

import errno
import json
import os
import shutil
import subprocess
import sys
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from numpy.testing import assert_array_equal

import jaxunlearn as ju
from jaxunlearn import recipes, sharding
from jaxunlearn.io import checkpoint
from tests import tiny

SETTINGS = dict(width=32, heads=8, kv_heads=8, head_dim=4, hidden=32, vocab=64)
CONFIG = {"seed": 1, "steps": 9, "recipe": {"learning_rate": 0.1}}


def shapes_of(state, mesh=None, rules=((".*", ()),)):
    mesh = mesh or sharding.make_mesh()
    return jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
        state,
        sharding.by_rules(state, mesh, rules),
    )


def small(value=0.0):
    """A state with a key, a None, a bfloat16, a bool and an optimizer's tuples."""
    draws = jax.random.normal(jax.random.key(7), (64, 32))  # nothing to compress
    params = {"a": {"w": draws + value}, "b": None}
    tx = optax.adamw(1e-3, mu_dtype=jnp.bfloat16)
    state = ju.init_state(params, tx, jax.random.key(3))
    return {"state": state, "flag": jnp.array([True, False])}


def raw(tree):
    return {k: np.asarray(v) for k, v in checkpoint._raw(tree).items()}


def same(actual, expected):
    actual, expected = raw(actual), raw(expected)
    assert actual.keys() == expected.keys()
    for path, value in expected.items():
        assert actual[path].dtype == value.dtype
        assert_array_equal(actual[path], value)


@pytest.fixture
def filled(tmp_path):
    """A folder with the checkpoints 1, 2 and 3."""
    saved = checkpoint.open(tmp_path / "c")
    for step in (1, 2, 3):
        checkpoint.save(saved, step, small(step), data={"batch": step}, config=CONFIG)
    checkpoint.close(saved)
    return tmp_path / "c"


def test_what_is_saved_comes_back_bit_for_bit(filled):
    saved = checkpoint.open(filled)
    found = checkpoint.restore(saved, shapes_of(small()), config=CONFIG)
    assert (found.step, found.data, found.skipped) == (3, {"batch": 3}, ())
    same(found.state, small(3))
    key = found.state["state"].key
    assert jax.random.key_impl(key) == jax.random.key_impl(jax.random.key(3))
    checkpoint.save(saved, 4, found.state)
    checkpoint.close(saved)
    assert checkpoint.steps(checkpoint.open(filled)) == [2, 3, 4]
    assert checkpoint.restore(checkpoint.open(filled / "new"), small()) is None


def test_orbax_reports_no_deprecated_use(tmp_path):
    """It reports some by an event of jax.monitoring, not by a warning."""
    events = []

    def record(name, **_):
        events.append(name)

    jax.monitoring.register_event_listener(record)
    try:
        saved = checkpoint.open(tmp_path, keep=1)
        for step in (1, 2):
            checkpoint.save(saved, step, small(float(step)), config={"a": 1})
        checkpoint.wait(saved)
        assert checkpoint.restore(saved, shapes_of(small())).step == 2
        assert checkpoint.steps(saved) == [2]
        checkpoint.close(saved)
    finally:
        jax.monitoring.unregister_event_listener(record)
    assert events and not [name for name in events if "deprecat" in name]


def test_a_step_is_never_used_twice(filled):
    saved = checkpoint.open(filled)
    with pytest.raises(ValueError, match="a new step, after 3, got step=3"):
        checkpoint.save(saved, 3, small())


@pytest.mark.slow
def test_a_run_goes_on_on_another_mesh(tmp_path):
    model, params = tiny.tiny_model(**SETTINGS)
    recipe = recipes.openunlearning.simnpo(model, learning_rate=1e-3)
    streams = {
        k: tiny.tiny_batch(8, 12, seed=i) for i, k in enumerate(("forget", "retain"))
    }
    fresh = partial(ju.init_state, tx=recipe.tx, key=jax.random.key(0))

    def go(mesh, state, steps):
        plain = ju.make_step(recipe.terms, recipe.tx)
        step = sharding.jit_step(plain, mesh, model.rules, state)
        with jax.numpy_dtype_promotion("standard"):
            for _ in range(steps):
                state, _ = step(state, streams, ju.Frozen())
        return state

    first = sharding.make_mesh(fsdp=4, tensor=2)
    middle = go(first, sharding.create(fresh, first, model.rules, params), 2)
    saved = checkpoint.open(tmp_path)
    checkpoint.save(saved, 2, middle)
    checkpoint.wait(saved)
    shapes = shapes_of(middle, first, model.rules)
    expected = raw(go(first, middle, 2))
    again = checkpoint.restore(saved, shapes).state
    kernel = again.params["blocks"]["mlp"]["up"]["kernel"]
    assert kernel.addressable_shards[0].data.shape == (3, 8, 16)
    for path, value in raw(go(first, again, 2)).items():
        assert_array_equal(value, expected[path], err_msg=path)
    other = sharding.make_mesh(data=2, fsdp=2, tensor=2)
    moved = checkpoint.restore(saved, shapes_of(again, other, model.rules)).state
    for path, value in raw(go(other, moved, 2)).items():
        np.testing.assert_allclose(value, expected[path], rtol=0, atol=1e-6)


def damage_by_flip(folder):
    """One bit in the middle of every file of arrays."""
    for file in (folder / "state").rglob("d/*"):
        text = bytearray(file.read_bytes())
        text[len(text) // 2] ^= 4
        file.write_bytes(text)


def damage_by_loss(folder):
    shutil.rmtree(folder / "state")


def damage_by_cut(folder):
    for file in folder.rglob("*"):
        if file.is_file():
            os.truncate(file, file.stat().st_size // 2)


@pytest.mark.parametrize("damage", [damage_by_flip, damage_by_loss, damage_by_cut])
def test_a_damaged_checkpoint_falls_back_to_the_one_before(filled, damage):
    damage(filled / "3")
    saved = checkpoint.open(filled)
    found = checkpoint.restore(saved, shapes_of(small()), config=CONFIG)
    assert found.step == 2 and [step for step, _ in found.skipped] == [3]
    same(found.state, small(2))
    checkpoint.save(saved, 3, small(3), config=CONFIG)  # the step can be had again
    checkpoint.wait(saved)
    assert checkpoint.restore(saved, shapes_of(small())).step == 3
    assert (filled / "damaged" / "3").is_dir()


def test_a_folder_without_an_intact_checkpoint_is_an_error(filled):
    for step in (1, 2, 3):
        damage_by_cut(filled / str(step))
    with pytest.raises(OSError, match="all in .* are damaged .*Move the folder away"):
        checkpoint.restore(checkpoint.open(filled), shapes_of(small()))


def test_wrong_values_that_can_be_read_are_noticed():
    state = {"w": jnp.arange(6.0), "h": jnp.ones(3, jnp.bfloat16), "n": jnp.int8(4)}
    sums = checkpoint._sums(state)
    for path, at in (("w", 5), ("h", 0)):
        other = state | {path: state[path].at[at].add(jnp.ones((), state[path].dtype))}
        changed = checkpoint._sums(other)
        assert [k for k in sums if sums[k] != changed[k]] == [path]
    cut = jax.device_put(
        jnp.arange(8.0), jax.NamedSharding(sharding.make_mesh(), jax.P("fsdp"))
    )
    assert checkpoint._sums({"w": cut}) == checkpoint._sums({"w": jnp.arange(8.0)})


def test_a_checkpoint_of_another_run_is_refused(filled):
    saved = checkpoint.open(filled)
    shapes = shapes_of(small())
    wide = shapes | {"flag": jax.ShapeDtypeStruct((5,), jnp.bool_)}
    with pytest.raises(
        ValueError, match=r"another model.*flag needs bool\[5\], got bool\[2\]"
    ):
        checkpoint.restore(saved, wide)
    other = CONFIG | {"recipe": {"learning_rate": 0.2}, "steps": 20}
    with pytest.raises(
        ValueError, match=r"another config: recipe.learning_rate was 0.1, now 0.2\. Set"
    ):
        checkpoint.restore(saved, shapes, config=other, may_differ=("steps",))
    with pytest.raises(ValueError, match=r"steps was 9, now 20"):
        checkpoint.restore(saved, shapes, config=other)
    found = checkpoint.restore(
        saved, shapes, config=other, may_differ=("steps", "recipe")
    )
    assert found.step == 3


FULL = """
import resource, sys, jax, jax.numpy as jnp, signal
from jaxunlearn.io import checkpoint
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
saved = checkpoint.open(sys.argv[1])
def state(value):
    return {"w": jax.random.normal(jax.random.key(value), (1 << 16,))}
checkpoint.save(saved, 1, state(1)); checkpoint.wait(saved)
resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 15, 1 << 20))
try:
    checkpoint.save(saved, 2, state(2)); checkpoint.wait(saved)
except checkpoint.NotSaved as error:
    print(error)
resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))
saved = checkpoint.open(sys.argv[1])
shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype,
    sharding=jax.sharding.SingleDeviceSharding(jax.devices()[0])), state(1))
found = checkpoint.restore(saved, shapes)
assert found.step == 1 and (found.state["w"] == state(1)["w"]).all()
checkpoint.save(saved, 2, state(2)); checkpoint.wait(saved)
print(checkpoint.steps(saved))
"""


def test_a_full_disk_keeps_the_checkpoint_before(tmp_path):
    run = [sys.executable, "-c", FULL, str(tmp_path / "c")]
    done = subprocess.run(run, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "The checkpoint of step 1 is complete. Free some disk space" in done.stdout
    assert done.stdout.endswith("[1, 2]\n")


NO_SPACE = """
import sys, jax
from pathlib import Path
from jaxunlearn.io import checkpoint
saved = checkpoint.open(sys.argv[1])
def state(value):
    return {"w": jax.random.normal(jax.random.key(value), (1 << 16,))}
checkpoint.save(saved, 1, state(1)); checkpoint.wait(saved)
other = Path(sys.argv[1]).parent / "other"
with other.open("wb") as file:
    try:
        while True:
            file.write(bytes(1 << 14)); file.flush()
    except OSError as error:
        print("errno", error.errno)
try:
    checkpoint.save(saved, 2, state(2)); checkpoint.wait(saved)
except checkpoint.NotSaved as error:
    print(error)
other.unlink()
saved = checkpoint.open(sys.argv[1])
shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype,
    sharding=jax.sharding.SingleDeviceSharding(jax.devices()[0])), state(1))
found = checkpoint.restore(saved, shapes)
assert found.step == 1 and (found.state["w"] == state(1)["w"]).all()
checkpoint.save(saved, 2, state(2)); checkpoint.wait(saved)
print(checkpoint.steps(saved))
"""
ALONE = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c"]
MOUNT = 'mount -t tmpfs -o size=2m none "$0" && '


@pytest.mark.slow
def test_a_file_system_without_space_keeps_the_checkpoint_before(tmp_path):
    """ENOSPC of a real file system, a small one in memory that only this test sees."""
    try:
        mounts = [*ALONE, MOUNT + "true", str(tmp_path)]
        reason = subprocess.run(mounts, capture_output=True, text=True).stderr
    except FileNotFoundError as error:
        reason = str(error)
    if reason:
        pytest.skip(f"no file system can be mounted here: {reason.strip()}")
    run = [sys.executable, "-c", NO_SPACE, str(tmp_path / "c")]
    command = [*ALONE, MOUNT + 'exec "$@"', str(tmp_path), *run]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert f"errno {errno.ENOSPC}" in done.stdout
    assert "The checkpoint of step 1 is complete. Free some disk space" in done.stdout
    assert done.stdout.endswith("[1, 2]\n")


def test_a_place_that_is_no_folder_is_an_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(checkpoint.NotSaved, match="needs a folder"):
        checkpoint.open(tmp_path / "file")


def test_values_whose_sums_do_not_match_are_damage(filled):
    file = next(
        x for x in (filled / "3" / "note").iterdir() if '"sums"' in x.read_text()
    )
    note = json.loads(file.read_text())
    note["sums"]["state/params/a/w"] ^= 1
    file.write_text(json.dumps(note))
    found = checkpoint.restore(checkpoint.open(filled), shapes_of(small()))
    assert found.step == 2
    assert found.skipped == ((3, "the bits of 'state/params/a/w' changed on disk"),)
