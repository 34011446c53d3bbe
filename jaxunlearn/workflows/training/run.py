# SPDX-License-Identifier: Apache-2.0
"""Finetunes, unlearns or evaluates, as one config file says, and survives being killed.

    python -m jaxunlearn.workflows.training.run --config=experiments/configs/tiny.py --config.steps=30

The same command again goes on where the last checkpoint stands, on any mesh; a run
that is finished says so. The output folder gets checkpoints/, metrics.jsonl, the events
of TensorBoard, result.json and, where the model came from a Hugging Face checkpoint,
model/ in that format. Exit status: 0 finished; 75 asked to stop by SIGTERM and saved,
so start the same command again; 2 a config or an input that cannot be run; 1 anything
else.
"""

import difflib
import json
import math
import sys
import time
from functools import partial
from importlib import metadata
from pathlib import Path

import jax
import numpy as np
from absl import app, flags, logging
from jax.experimental import multihost_utils
from ml_collections import ConfigDict, config_flags

import jaxunlearn as ju
from jaxunlearn import _checks, evaluate, sharding, trees
from jaxunlearn.data import loader, source, table
from jaxunlearn.io import checkpoint, hf, log, preempt
from jaxunlearn.workflows.training import build, settings, streams, trackers

_CONFIG = config_flags.DEFINE_config_file("config", help_string="a config's file")
REFUSED = (ValueError, TypeError, ImportError, OSError, _checks.Missing)


def parse(argv: list[str]) -> list[str]:
    """absl's parsing of flags, with what it raises said in one line."""
    try:
        rest = flags.FLAGS(argv)
        _ = _CONFIG.value.mode  # where the file could not be loaded, this says why
        return rest
    except flags.UnrecognizedFlagError as error:
        _refuse(f"There is no --{error.flagname}.{_near(error.flagname)}")
    except (AttributeError, KeyError) as error:
        name = str(error).strip("\"'")
        _refuse(f"The config has no key {name!r}.{_near(name)}")
    except (flags.Error, OSError, TypeError, ValueError, SyntaxError) as error:
        _refuse(error)


def _near(name: str) -> str:
    name = name.removeprefix("config.")
    close = difflib.get_close_matches(name, settings.keys(), n=1)
    return f" Did you mean --config.{close[0]}?" if close else ""


def main(argv: list[str]) -> None:
    """Checks the config and runs it."""
    logging.set_verbosity(logging.WARNING)
    if len(argv) > 1 or _CONFIG.value is None:
        _refuse(
            f"run needs --config=FILE and nothing bare, got {argv[1:] or 'no flag'}."
        )
    try:
        config = settings.check(_CONFIG.value)
        if config.distributed.join:
            c = config.distributed
            given = (c.coordinator, c.processes, c.process) if c.coordinator else ()
            sharding.initialize(*given)
    except (*REFUSED, RuntimeError) as error:
        _refuse(error)
    try:
        run(config)
    except source.BadRow as error:
        _refuse(error, status=1)


def run(config: ConfigDict) -> dict:
    """What result.json holds; ends the program where main's docstring says so."""
    asked = preempt.watch()
    start = time.perf_counter()
    output = Path(config.output).expanduser()
    plain = json.loads(json.dumps(config.to_dict()))
    free = settings.MAY_DIFFER + (("mode",) if config.mode == "evaluate" else ())
    try:
        output.mkdir(parents=True, exist_ok=True)
        built = build.pieces(config)
        saved = checkpoint.open(output / "checkpoints", keep=config.keep)
        found = checkpoint.restore(saved, built.state, config=plain, may_differ=free)
        for step, why in found.skipped if found else ():
            _say(f"The checkpoint of step {step} is damaged ({why}); it was put aside.")
        done = found.step if found else 0
        file = output / "result.json"
        if config.mode != "evaluate" and done >= config.steps and file.exists():
            _say(f"Finished: {done} steps are done, results are in {file}.")
            return json.loads(file.read_text())
        _say(f"Going on after step {done}." if found else "Beginning.")
        original, tokenizer = _original(config, built)
        made = streams.sources(config, built.model, tokenizer)
    except REFUSED as error:
        _refuse(error)

    _, frozen = built.recipe.split(original)
    if config.mode == "evaluate":
        state = found.state if found else None
    else:
        state = found.state if found else _fresh(built, original, config.seed)
        rows = _referenced(config, built, original, made)
        del original  # a copy of all that trains
        batches = _loader(config, rows, found)
        state = _train(config, built, saved, state, frozen, batches, asked, plain)
        batches.close()
    merged = trees.merge(state.params, frozen.params) if state else original
    result = {
        "mode": config.mode,
        "step": int(state.step) if state else 0,
        "scores": _evaluate(config, built, merged, made),
        "seconds": time.perf_counter() - start,
        "devices": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
        "mesh": dict(built.mesh.shape),
        "versions": {name: metadata.version(name) for name in checkpoint.LIBRARIES},
        "config": plain,
    }
    checkpoint.close(saved)
    if config.model.path and config.mode != "evaluate":
        _export(built.model, merged, output / "model", tokenizer)
    name = "evaluate.json" if config.mode == "evaluate" else "result.json"
    if jax.process_index() == 0:
        text = json.dumps(log.plain(result), indent=2) + "\n"
        fresh = output / f"{name}.new"
        fresh.write_text(text)
        fresh.replace(output / name)
    for stream, score in result["scores"].items():
        _say(f"{stream}: nll {score['nll']:.4f}, perplexity {score['perplexity']:.2f}")
    _say(f"Done. Results are in {output / name}.")
    return result


def _referenced(config, built, original, made):
    """The streams that the recipe reads, with the reference's log-probabilities."""
    output = Path(config.output).expanduser()
    found = {}
    for name, columns in built.recipe.reads().items():
        rows, size = made[name], config.data[name].rows
        found[name] = rows
        if "ref_logps" in columns:
            score = partial(_scores, built, original, rows, size)
            found[name] = streams.with_reference(config, name, rows, output, score)
    return found


def _loader(config, rows, found):
    """This process's share of the batches, from where the checkpoint stands."""
    sizes = {name: config.data[name].rows for name in rows}
    shard = (jax.process_index(), jax.process_count())
    try:
        batches = loader.streams(rows, sizes, seed=config.seed, shard=shard)
        if found:
            batches.set_state(found.data)
        return batches
    except REFUSED as error:
        _refuse(error)


def _train(config, built, saved, state, frozen, batches, asked, plain):
    """The state after the last step; ends the program if asked to stop before it."""
    output = Path(config.output).expanduser()
    done = int(state.step)
    try:
        hooks = trackers.hooks(config, output, done)
    except ImportError as error:
        _refuse(error)
    hooks.append(
        preempt.hook(
            saved,
            every=config.save_every,
            steps=config.steps,
            asked=asked,
            data=lambda step: batches.get_state(),
            config=plain,
        )
    )
    try:
        state, _ = ju.fit(
            built.step,
            state,
            batches,
            frozen,
            steps=config.steps,
            hooks=hooks,
            progress=sys.stderr.isatty() and jax.process_index() == 0,
        )
        checkpoint.wait(saved)
    except (ju.NotFinite, checkpoint.NotSaved) as error:
        _refuse(error, status=1)
    if int(state.step) < config.steps:
        _say(f"Asked to stop: step {int(state.step)} is saved. Same command to go on.")
        raise SystemExit(preempt.EXIT)
    return state


def _original(config, built):
    """(params before anything was changed, on the mesh; tokenizer or None)."""
    if not config.model.path:
        init = partial(_init, built.model.init, config.model.dtype)
        key = jax.random.key(config.seed)
        return sharding.create(init, built.mesh, built.model.rules, key), None
    path, dtype = build.path(config.model.path), config.model.dtype
    _, params, tokenizer = hf.load(path, dtype=dtype, mesh=built.mesh)
    return params, tokenizer


def _init(init, dtype, key):
    return jax.tree.map(lambda x: x.astype(dtype), init(key))


def _fresh(built, original, seed):
    train, _ = built.recipe.split(original)
    fresh = partial(ju.init_state, tx=built.recipe.tx)
    key = jax.random.key(seed)
    return sharding.create(fresh, built.mesh, built.model.rules, train, key=key)


def _evaluate(config, built, params, made):
    """Mean negative log-probability of an answer token, and perplexity, by stream."""
    found = {}
    for name, rows in made.items():
        size, most = config.data[name].rows, config.evaluate.rows
        if most:
            rows = table.select(rows, range(min(most, table.num_rows(rows))), name=name)
        logps, lengths = _scores(built, params, rows, size)
        nll = -float(logps.sum(dtype=np.float64)) / max(1, int(lengths.sum()))
        perplexity = math.exp(nll) if nll < 700 else math.inf
        found[name] = {"nll": nll, "perplexity": perplexity, "rows": len(logps)}
    return found


def _scores(built, params, rows, size):
    return evaluate.answer_logps(
        built.model, params, rows, batch_size=size, mesh=built.mesh
    )


def _export(model, params, folder, tokenizer):
    if jax.process_count() > 1:
        params = multihost_utils.process_allgather(params, tiled=True)
    if jax.process_index() == 0:
        hf.save(model, params, folder, tokenizer=tokenizer)


def _say(text: str) -> None:
    if jax.process_index() == 0:
        print(text, flush=True)


def _refuse(error, status: int = 2) -> None:
    print(f"error: {error}", file=sys.stderr, flush=True)
    raise SystemExit(status)


if __name__ == "__main__":
    app.run(main, flags_parser=parse)
