# SPDX-License-Identifier: Apache-2.0
"""A run from a config to a saved model; `jaxunlearn forget` and `finetune` call it.

    config = settings.defaults()
    ...
    result = run.run(settings.check(config), command="what made this run")

The same config again resumes from the newest checkpoint, on any mesh, and bit for bit
on the same mesh. workflows/run_folder.py lists what the output folder gets. With
mode="evaluate" nothing trains: the model, or the run's newest checkpoint, is scored.
"""

import json
import math
import sys
import time
from collections.abc import Callable, Mapping
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from ml_collections import ConfigDict

import jaxunlearn as ju
from jaxunlearn import data, edits, evaluate, sharding, trees
from jaxunlearn.data import loader, table
from jaxunlearn.io import checkpoint, hf, log, preempt
from jaxunlearn.typing import Model, Params
from jaxunlearn.workflows import records, run_folder
from jaxunlearn.workflows.run_folder import RunFolder
from jaxunlearn.workflows.training import (
    adapters,
    build,
    describe,
    settings,
    streams,
    trackers,
)

LIBRARIES = ("jaxunlearn", *checkpoint.LIBRARIES)
PASSES = 5  # over the forget rows, where the config gives no number of steps
Log = Callable[[str], None]


def run(
    config: ConfigDict,
    *,
    command: str = "",
    log_fn: Log = print,
    progress: bool = False,
) -> dict[str, Any]:
    """Finetunes, unlearns or evaluates; what result.json or evaluate.json holds.

    Args:
        config: as settings.check returns it.
        command: stored in run.json.
        log_fn: gets the lines about the run, in the first process only.
        progress: shows a progress bar instead of a line every few steps.
    Raises:
        ValueError, TypeError, KeyError, OSError, ImportError: for a config or an input
            that cannot be used; before the weights are loaded, where possible.
        preempt.Stopped: after SIGTERM or Ctrl-C during training, once the state is
            saved.
        NotFinite, checkpoint.NotSaved, source.BadRow: if the run failed on its way.
    """
    start = time.perf_counter()
    log_fn = log_fn if jax.process_index() == 0 else lambda line: None
    training = config.mode != "evaluate"
    folder = run_folder.at(config.output)
    records.make_folder("A run", folder.path)
    model = build.base_model(config)
    tokenizer = hf.load_tokenizer(config.model.path) if config.model.path else None
    pairs = build.pairs(config, model)
    rows = streams.read(config, model, tokenizer, pairs=pairs)
    config = _completed(config, rows, model)
    built = build.pieces(config)
    plain = json.loads(json.dumps(config.to_dict()))

    free = settings.MAY_DIFFER + (() if training else ("mode",))
    saved = checkpoint.open(folder.checkpoints, keep=config.keep)
    found = checkpoint.restore(saved, built.state, config=plain, may_differ=free)
    for step, why in found.skipped if found else ():
        log_fn(f"The checkpoint of step {step} is damaged ({why}). It was put aside.")
    done = found.step if found else 0
    if training and done >= config.steps and folder.result.exists():
        log_fn(f"Finished: {done} steps are done, the results are in {folder.result}.")
        return json.loads(folder.result.read_text(encoding="utf-8"))
    if training:
        # Tracing finds wrong arguments of losses before the weights are loaded.
        built.step.trace(built.state, built.streams, built.frozen)
        _record(config, folder, command, plain)
        for line in describe.plan(config, built, rows):
            log_fn(line)
    log_fn(f"Resuming after step {done}." if found else "Loading the model.")

    original = _original(config, built)
    scores = {"before": _evaluate(config, built, original, rows)} if training else {}
    params = _added(config, built, original, rows)
    _, frozen = built.recipe.split(params)
    if not training:
        state = found.state if found else None
    else:
        state = found.state if found else _fresh(built, params, config.seed)
        batches = _batches(config, built, original, rows, folder)
        del params
        if not describe.subtracts(config):
            original = None  # frees a copy of all that trains
        if found:
            batches.set_state(found.data)
        state = _train(
            config, built, saved, state, frozen, batches, plain, log_fn, progress
        )
        batches.close()
    params = trees.merge(state.params, frozen.params) if state else original
    params = adapters.folded(config, built.model, params) if state else params
    if training and describe.subtracts(config):
        params = edits.task_vector(original, params, scale=config.recipe.scale)
    scores["after" if training else "model"] = _evaluate(config, built, params, rows)

    result = {
        "mode": config.mode,
        "step": int(state.step) if state else 0,
        "scores": scores if training else scores["model"],
        "seconds": time.perf_counter() - start,
        "devices": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
        "mesh": dict(built.mesh.shape),
        "versions": _versions(),
        "config": plain,
    }
    checkpoint.close(saved)
    if config.model.path and training:
        _export(built.base, params, folder.model, tokenizer)
    file = folder.result if training else folder.path / "evaluate.json"
    if jax.process_index() == 0:
        fresh = file.with_name(f"{file.name}.new")
        fresh.write_text(
            json.dumps(log.plain(result), indent=2) + "\n", encoding="utf-8"
        )
        fresh.replace(file)
    for line in describe.losses(scores):
        log_fn(line)
    where = folder.model if config.model.path and training else file
    log_fn(f"Done in {result['seconds']:.0f} s: {where}")
    return result


def _completed(
    config: ConfigDict, rows: Mapping[str, streams.Stream], model: Model
) -> ConfigDict:
    """The config with what the rows gave: columns, lengths, and the number of steps;
    and with the dtype that the model computes in."""
    config = config.copy_and_resolve_references()
    with config.unlocked():
        config.model.compute_dtype = model.config.compute_dtype
        for name, stream in rows.items():
            config.data[name] = stream.settings
    if not config.steps:
        first = "forget" if "forget" in rows else next(iter(rows))
        count = table.num_rows(rows[first].rows)
        config.steps = -(-PASSES * count // config.data[first].rows)
    return config


def _record(config, folder: RunFolder, command: str, plain: dict) -> None:
    """Writes run.json."""
    if jax.process_index() != 0:
        return
    first = "forget" if "forget" in config.data else next(iter(config.data))
    record = run_folder.Record(
        action="finetune" if config.mode == "finetune" else "forget",
        command=command,
        original=_absolute(config.model.path),
        method=config.recipe.name,
        arguments=plain["recipe"]["args"],
        seed=config.seed,
        streams={
            name: run_folder.Stream(
                s["source"],
                _absolute(s.get("path", "")),
                s.get("prompt", ""),
                s.get("answer", ""),
            )
            for name, s in plain["data"].items()
        },
        prompt_format=streams.prompt_format(config, plain["data"][first]),
        versions=_versions(),
        config=plain,
    )
    run_folder.write(folder, record)


def _absolute(path: str) -> str:
    """The absolute path of a file or folder; a name on the hub as it is."""
    place = Path(path).expanduser()
    return str(place.absolute()) if path and place.exists() else path


def _versions() -> dict[str, str]:
    return {name: metadata.version(name) for name in LIBRARIES}


def _original(config: ConfigDict, built: build.Pieces) -> Params:
    """Params before any change, on the mesh."""
    if config.model.path:
        dtype = config.model.dtype
        return hf.load(config.model.path, dtype=dtype, mesh=built.mesh)[1]
    init = partial(_init, built.base.init, config.model.dtype)
    key = jax.random.key(config.seed)
    return sharding.create(init, built.mesh, built.base.rules, key)


def _init(init, dtype, key):
    return jax.tree.map(lambda x: x.astype(dtype), init(key))


def _added(config, built: build.Pieces, params: Params, rows) -> Params:
    """The params with the leaves of LoRA or of projections, on the mesh."""
    if built.model is built.base:
        return params
    key = jax.random.fold_in(jax.random.key(config.seed), 1)
    plain = {name: stream.rows for name, stream in rows.items()}
    params = adapters.added(config, built.model, params, plain, key)
    places = sharding.by_rules(params, built.mesh, built.model.rules)
    return jax.device_put(params, places)


def _fresh(built: build.Pieces, params: Params, seed: int) -> ju.UnlearnState:
    train, _ = built.recipe.split(params)
    fresh = partial(ju.init_state, tx=built.recipe.tx)
    key = jax.random.key(seed)
    return sharding.create(fresh, built.mesh, built.model.rules, train, key=key)


def _batches(config, built, original, rows, folder: RunFolder) -> loader.Loader:
    """This process's share of the batches that the recipe reads, from step 0."""
    found, sizes = {}, {}
    for name, columns in built.recipe.reads().items():
        stream, sizes[name] = rows[name], config.data[name].rows
        found[name] = stream.rows
        if "ref_logps" in columns:
            score = partial(_logps, built, original, stream.rows, sizes[name])
            found[name] = streams.with_reference(
                config, name, stream, folder.path, score
            )
    for group in built.recipe.pairs():
        ids = {name: rows[name].ids for name in group}
        ids = None if None in ids.values() else ids
        found |= data.paired({name: found[name] for name in group}, ids=ids)
    shard = (jax.process_index(), jax.process_count())
    return loader.streams(found, sizes, seed=config.seed, shard=shard)


def _train(
    config, built, saved, state, frozen, batches, plain, log_fn: Log, progress: bool
) -> ju.UnlearnState:
    """The state after the last step; raises preempt.Stopped after a signal."""
    progress = progress and jax.process_index() == 0
    hooks = trackers.hooks(config, run_folder.at(config.output).path, int(state.step))
    if not progress:
        hooks.append(trackers.lines(config.steps, config.log.every, log_fn))
    notice = "Stopping after this step. Press Ctrl-C again to stop without saving."
    with preempt.watch(callback=lambda _: print(notice, file=sys.stderr)) as stop:
        hooks.append(
            preempt.hook(
                saved,
                every=config.save_every,
                steps=config.steps,
                stop=stop,
                data=lambda step: batches.get_state(),
                config=plain,
            )
        )
        state, _ = ju.fit(
            built.step,
            state,
            batches,
            frozen,
            steps=config.steps,
            hooks=hooks,
            progress=progress,
        )
        checkpoint.wait(saved)
        if int(state.step) < config.steps:
            raise preempt.Stopped(
                f"Stopped: step {int(state.step)} is saved. Run the same command again "
                "to resume.",
                stop.status,
            )
    return state


def _evaluate(config, built: build.Pieces, params: Params, rows) -> dict[str, dict]:
    """Loss (nats, mean over answer tokens) and perplexity of the first rows of each
    stream."""
    found = {}
    for name, stream in rows.items():
        part, size, most = stream.rows, config.data[name].rows, config.evaluate.rows
        if most:
            part = table.select(part, range(min(most, table.num_rows(part))), name=name)
        logps, lengths = _logps(built, params, part, size)
        nll = -float(logps.sum(dtype=np.float64)) / max(1, int(lengths.sum()))
        perplexity = math.exp(nll) if nll < 700 else math.inf
        found[name] = {"nll": nll, "perplexity": perplexity, "rows": len(logps)}
    return found


def _logps(built, params, rows, size):
    return evaluate.answer_logps(
        built.base, params, rows, batch_size=size, mesh=built.mesh
    )


def _export(model: Model, params: Params, folder: Path, tokenizer: Any) -> None:
    if jax.process_count() > 1:
        params = multihost_utils.process_allgather(params, tiled=True)
    if jax.process_index() == 0:
        hf.save(model, params, folder, tokenizer=tokenizer)
