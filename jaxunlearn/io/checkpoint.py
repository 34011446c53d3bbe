# SPDX-License-Identifier: Apache-2.0
"""Checkpoints of a training run: written in the background, complete or not at all.

    saved = checkpoint.open("runs/a/checkpoints", keep=3)
    found = checkpoint.restore(saved, shapes, config=config)   # None in a new folder
    checkpoint.save(saved, step, state, data=position, config=config)
    checkpoint.wait(saved)

A checkpoint holds the state, the position in the data, the config and the versions of
the libraries. Orbax writes it in the background, each device its shards, and it gets
its final name only when it is complete on disk. Restoring needs the shapes of the state
with the shardings to restore to, of any mesh. Every leaf is saved with a sum over its
bits, so that a damaged file is noticed even if it can still be read.
"""

import errno
import json
import os
import re
import shutil
from collections.abc import Collection, Mapping
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import multihost_utils

from jaxunlearn import _checks, trees
from jaxunlearn.io import log
from jaxunlearn.typing import Array, PyTree

_NOTE = ("data", "config", "leaves", "sums", "keys")
LIBRARIES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint")
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_FULL_TEXT = re.compile("no space left|disk quota|file too large|ENOSPC", re.IGNORECASE)


class Checkpoints(NamedTuple):
    """An open folder of checkpoints.

    Attributes:
        path: the folder; each checkpoint is a folder in it, named by its step.
        manager: the CheckpointManager of orbax.
    """

    path: Path
    manager: Any


class Restored(NamedTuple):
    """The contents of a checkpoint.

    Attributes:
        step: updates that had been applied.
        state: arrays, of the shapes that `restore` was given.
        data: the position in the data that `save` was given.
        skipped: (step, the damage) of newer checkpoints that could not be used.
    """

    step: int
    state: PyTree
    data: Any
    skipped: tuple[tuple[int, str], ...]


class NotSaved(OSError):
    """A checkpoint could not be written; earlier checkpoints are complete."""


def open(folder: str | os.PathLike, *, keep: int = 3) -> Checkpoints:  # noqa: A001
    """Opens or makes a folder of checkpoints, and removes unfinished ones.

    Args:
        folder: on a file system that all processes share.
        keep: the number of newest checkpoints that stay. An older one is removed only
            when a newer one is complete on disk. With two or more, a damaged checkpoint
            has one before it.
    Raises:
        ValueError: if keep < 1.
        NotSaved: if the folder cannot be made.
    """
    _checks.positive_int("checkpoint.open", keep=keep)
    path = Path(folder).expanduser().absolute()
    ocp = _orbax()
    options = ocp.CheckpointManagerOptions(
        preservation_policy=ocp.checkpoint_managers.LatestN(keep),
        cleanup_tmp_directories=True,
        enable_async_checkpointing=True,
    )
    try:
        path.mkdir(parents=True, exist_ok=True)
        manager = ocp.CheckpointManager(path, options=options)
    except (OSError, ValueError) as error:
        raise NotSaved(
            f"checkpoint.open needs a folder that it can write, got {path}: {error}. "
            "Name another."
        ) from error
    return Checkpoints(path, manager)


def steps(saved: Checkpoints) -> list[int]:
    """Steps of the checkpoints in the folder, oldest first."""
    saved.manager.reload()
    return sorted(saved.manager.all_steps())


def save(
    saved: Checkpoints,
    step: int,
    state: PyTree,
    *,
    data: Any = None,
    config: Mapping[str, Any] | None = None,
) -> None:
    """Starts to write a checkpoint and returns when the arrays may change again.

    Args:
        saved: from `open`.
        step: updates applied so far; larger than the step of every checkpoint there.
        state: tree of arrays, which may include PRNG keys; None has no leaf.
        data: the position of the loader, anything that JSON can hold.
        config: the settings of the run, anything that JSON can hold.
    Raises:
        ValueError: if the step is not new.
        NotSaved: if this checkpoint or the one started before could not be written.
    """
    _settle(saved, saved.manager.wait_until_finished)
    last = saved.manager.latest_step()
    if last is not None and step <= last:
        raise ValueError(
            f"checkpoint.save needs a new step, after {last}, got step={step}. "
            "Restore first, or use another folder."
        )
    leaves = _raw(state)
    note = {
        "data": data,
        "config": log.plain(dict(config or {})),
        "leaves": _described(state),
        "sums": _sums(leaves),
        "keys": {
            path: str(jax.random.key_impl(leaf))
            for path, leaf in trees.paths(state).items()
            if _is_key(leaf)
        },
        "versions": {name: metadata.version(name) for name in LIBRARIES},
    }
    form = _orbax().args
    args = form.Composite(state=form.StandardSave(leaves), note=form.JsonSave(note))
    _settle(saved, partial(saved.manager.save, step, args=args))


def wait(saved: Checkpoints) -> None:
    """Returns when every started checkpoint is on disk.

    Raises:
        NotSaved: if it could not be written.
    """
    _settle(saved, saved.manager.wait_until_finished)


def close(saved: Checkpoints) -> None:
    """Waits, then releases the folder; errors are those of `wait`."""
    wait(saved)
    saved.manager.close()


def restore(
    saved: Checkpoints,
    shapes: PyTree,
    *,
    config: Mapping[str, Any] | None = None,
    may_differ: Collection[str] = (),
) -> Restored | None:
    """The newest undamaged checkpoint, or None if there is no checkpoint.

    Damaged checkpoints that are newer are moved to `damaged/` inside the folder, so
    that their step can be saved again.

    Args:
        saved: from `open`.
        shapes: tree like the state, a jax.ShapeDtypeStruct with a sharding (of any
            mesh) at each leaf.
        config: compared with the saved one, unless None.
        may_differ: dotted keys of config that are not compared, with the keys below.
    Raises:
        ValueError: if the checkpoint is of another model, optimizer or config, naming
            what differs.
        OSError: if there are checkpoints and all of them are damaged.
    """
    skipped: list[tuple[int, str]] = []
    for step in reversed(steps(saved)):
        try:
            note = _note(saved, step)
        except _Damaged as error:
            skipped.append((step, str(error)))
            continue
        _refuse_another(saved.path / str(step), note, shapes, config, may_differ)
        try:
            state = _state(saved, step, shapes, note)
        except _Damaged as error:
            skipped.append((step, str(error)))
            continue
        for bad, _ in skipped:
            _put_aside(saved, bad)
        return Restored(step, state, note["data"], tuple(skipped))
    if skipped:
        came = "; ".join(f"step {step}: {why}" for step, why in skipped)
        raise OSError(
            "checkpoint.restore needs an undamaged checkpoint, but all in "
            f"{saved.path} are damaged ({came}). Move the folder away to start again."
        )
    return None


def _orbax() -> Any:
    return _checks.library("io.checkpoint", "orbax.checkpoint", "checkpoint")


class _Damaged(Exception):
    """A checkpoint cannot be read, or not as it was written."""


def _note(saved: Checkpoints, step: int) -> dict[str, Any]:
    form = _orbax().args
    args = form.Composite(note=form.JsonRestore())
    try:
        note = saved.manager.restore(step, args=args)["note"]
        return {key: note[key] for key in _NOTE}
    except Exception as error:  # orbax, tensorstore and JSON each raise their own
        raise _Damaged(_first_line(error)) from error


def _state(saved: Checkpoints, step: int, shapes: PyTree, note: dict) -> PyTree:
    wanted = _raw(shapes)
    form = _orbax().args
    args = form.Composite(state=form.StandardRestore(wanted))
    try:
        leaves = saved.manager.restore(step, args=args)["state"]
    except Exception as error:
        raise _Damaged(_first_line(error)) from error
    sums = note["sums"]
    bad = [path for path, value in _sums(leaves).items() if value != sums.get(path)]
    if bad:
        raise _Damaged(f"the bits of {_checks.listed(bad, 3)} changed on disk")

    def leaf(path, like):
        x = leaves[path]
        key = _is_key(like)
        return jax.random.wrap_key_data(x, impl=note["keys"][path]) if key else x

    return trees.map_with_path(leaf, shapes)


def _raw(tree: PyTree) -> dict[str, Any]:
    """Leaves, or their shapes, by path; PRNG keys as their numbers."""
    return {path: _key_data(leaf) for path, leaf in trees.paths(tree).items()}


def _key_data(leaf: Any) -> Any:
    if not _is_key(leaf):
        return leaf
    if not isinstance(leaf, jax.ShapeDtypeStruct):
        return jax.random.key_data(leaf)
    raw = jax.eval_shape(jax.random.key_data, leaf)
    return jax.ShapeDtypeStruct(raw.shape, raw.dtype, sharding=leaf.sharding)


def _is_key(leaf: Any) -> bool:
    return jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _described(tree: PyTree) -> dict[str, str]:
    """Dtype and shape of each leaf, as in float32[3, 4]."""
    return {path: f"{x.dtype}{list(x.shape)}" for path, x in trees.paths(tree).items()}


def _sums(leaves: Mapping[str, Array]) -> dict[str, int]:
    """A sum of scrambled bits for each leaf, the same for every sharding."""
    return {path: int(x) for path, x in jax.device_get(_bit_sums(leaves)).items()}


@jax.jit
def _bit_sums(leaves):
    def one(x):
        if x.dtype == jnp.bool_:
            x = x.astype(jnp.uint8)
        width = max(8, min(32, 8 * x.dtype.itemsize))  # 64 bits become two times 32
        kind = jnp.dtype(f"uint{width}")
        bits = jax.lax.bitcast_convert_type(x, kind).astype(jnp.uint32)
        bits = (bits ^ (bits >> 15)) * jnp.uint32(0x2C1B3C6D)
        bits = (bits ^ (bits >> 12)) * jnp.uint32(0x297A2D39)
        return jnp.sum(bits ^ (bits >> 15), dtype=jnp.uint32)

    return jax.tree.map(one, leaves)


def _refuse_another(path, note, shapes, config, may_differ) -> None:
    needed, came = _described(shapes), note["leaves"]
    if needed != came:
        differ = [
            f"{name} needs {needed.get(name, 'no such leaf')}, got "
            f"{came.get(name, 'no such leaf')}"
            for name in sorted(needed.keys() | came.keys())
            if needed.get(name) != came.get(name)
        ]
        raise ValueError(
            f"The checkpoint {path} is of another model or optimizer: "
            f"{'; '.join(differ[:3])}{_more(differ)}. Use another folder, or the "
            "settings it was made with."
        )
    if config is None:
        return
    needed, came = (
        _flat(json.loads(json.dumps(log.plain(config)))),
        _flat(note["config"]),
    )
    differ = [
        f"{name} was {came.get(name, 'not set')!r}, now {needed.get(name, 'not set')!r}"
        for name in sorted(needed.keys() | came.keys())
        if needed.get(name) != came.get(name)
        and not any(name == x or name.startswith(x + ".") for x in may_differ)
    ]
    if differ:
        raise ValueError(
            f"The checkpoint {path} is of another config: {'; '.join(differ[:5])}"
            f"{_more(differ, 5)}. Set these back to resume, or use another folder."
        )


def _more(found: list[str], most: int = 3) -> str:
    return f" and {len(found) - most} more" if len(found) > most else ""


def _flat(tree: Any, path: str = "") -> dict[str, Any]:
    if not isinstance(tree, dict) or not tree:
        return {path: tree} if path else {}
    found = {}
    for key, value in tree.items():
        found |= _flat(value, f"{path}.{key}".removeprefix("."))
    return found


def _put_aside(saved: Checkpoints, step: int) -> None:
    if jax.process_index() == 0:
        aside = saved.path / "damaged"
        aside.mkdir(exist_ok=True)
        shutil.rmtree(aside / str(step), ignore_errors=True)
        os.replace(saved.path / str(step), aside / str(step))
    multihost_utils.sync_global_devices(f"jaxunlearn: {step} put aside")
    saved.manager.reload()


def _settle(saved: Checkpoints, function) -> None:
    """Calls a function that writes; its error becomes NotSaved with the next move."""
    try:
        function()
    except Exception as error:
        full = getattr(error, "errno", None) in FULL or _FULL_TEXT.search(str(error))
        if not full and not isinstance(error, OSError):
            raise
        complete = steps(saved)
        before = (
            f"The checkpoint of step {complete[-1]} is complete"
            if complete
            else "There is no earlier checkpoint"
        )
        fix = "Free some disk space" if full else "Make the folder writable"
        raise NotSaved(
            getattr(error, "errno", None) or errno.EIO,
            f"A checkpoint in {saved.path} could not be written: "
            f"{_first_line(error)}. {before}. {fix} and start the run again; a smaller "
            "`keep` needs less.",
        ) from error


def _first_line(error: BaseException) -> str:
    text = next(iter(str(error).strip().splitlines()), "")
    return f"{type(error).__name__}: {text}"[:200]
