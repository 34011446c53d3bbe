# SPDX-License-Identifier: Apache-2.0
"""Whether the training loop keeps the device busy, and what is compiled twice.

    python -m experiments.benchmarks.loop --output FILE

A small decoder runs `fit` twice: with a hook that does not read the state, where the
loop starts a step before it reads the metrics of the one before, and with a hook that
reads it, where the loop waits for every step. For both it counts how often the loop
reads from the device, and how often it does so while no later step was started: the
device then has nothing to do. On CPUs it also reads JAX's trace of the run: how many
steps were started before the one before had ended, and how long at most the device had
nothing to do between two steps. Then `attacks.relearn` runs twice, with another rate
and seed the second time, and the compilations of both calls are counted.
"""

import argparse
import contextlib
import gzip
import json
import statistics
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax

import jaxunlearn as ju
from experiments.shared import page
from jaxunlearn import attacks, combine, data, losses, models, terms

SHAPE = dict(family="llama", vocab=4000, width=256, layers=4, heads=4, kv_heads=4)
SHAPE |= dict(head_dim=64, hidden=704, positions=64, tied=True, remat="none")
ROWS, LENGTH = 8, 64  # rows of a step, tokens of a row
COMPILED = "/jax/core/compile/backend_compile_duration"
EXECUTED = (
    "ThunkExecutor::Execute (wait for completion)"  # a program, in traces of CPUs
)


class Spy:
    """A step that counts its starts, and how often `fit` reads its metrics."""

    def __init__(self, step: Any):
        self.check, self.takes_enabled = step.check, step.takes_enabled
        self._step, self._started = step, 0
        self.reads = self.reads_without_work = 0

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self._started += 1
        return self._step(*args, **kwargs)

    @contextlib.contextmanager
    def counting(self) -> Iterator[None]:
        """Counts what passes jax.device_get and is on a device."""
        get = jax.device_get

        def read(tree: Any) -> Any:
            if any(isinstance(x, jax.Array) for x in jax.tree.leaves(tree)):
                self.reads += 1
                self.reads_without_work += self.reads >= self._started
            return get(tree)

        jax.device_get = read
        try:
            yield
        finally:
            jax.device_get = get


def run_loop(step: Any, state: Any, table: Any, hook: Any, steps: int) -> dict:
    """Counts and times of one run of `fit`."""
    spy, batches = Spy(step), data.streams({"known": table}, ROWS, seed=0)
    with tempfile.TemporaryDirectory() as folder:
        trace = jax.profiler.trace(folder, create_perfetto_trace=True)
        with trace, spy.counting():
            start = time.perf_counter()
            state, log = ju.fit(spy, state, batches, steps=steps, hooks=[hook])
            seconds = time.perf_counter() - start
        (file,) = Path(folder).rglob("perfetto_trace.json.gz")
        with gzip.open(file) as opened:
            events = json.load(opened)
    events = events["traceEvents"] if isinstance(events, dict) else events
    return {
        "seconds": seconds,
        "step_seconds": statistics.median(entry["seconds"] for entry in log),
        "reads_per_step": spy.reads / steps,
        "reads_without_work_per_step": spy.reads_without_work / steps,
        "trace": _of_trace(events, steps),
    }


def _of_trace(events: list[Mapping[str, Any]], steps: int) -> dict[str, Any] | None:
    """What the trace of a CPU says about the steps; None for another trace."""
    spans = [event for event in events if event.get("ph") == "X"]
    calls = [event for event in spans if event["name"] == "PjitFunction(step)"]
    if not calls:
        return None
    thread = calls[0]["tid"]
    programs = sorted(
        (event["ts"], event["ts"] + event["dur"])
        for event in spans
        if event["name"] == EXECUTED and event["tid"] != thread
    )
    starts = sorted({event["ts"] for event in calls})[:: len(calls) // steps]
    if len(programs) != steps or len(starts) != steps:
        return None
    ahead = [
        start < end for start, (_, end) in zip(starts[1:], programs[:-1], strict=True)
    ]
    gaps = [
        after[0] - before[1]
        for before, after in zip(programs[:-1], programs[1:], strict=True)
    ]
    return {
        "started_before_the_last_ended": sum(ahead),
        "of": len(ahead),
        "gap_ms": statistics.median(gaps) / 1e3,
    }


def compilations(call: Any) -> dict[str, Any]:
    """The number of programs that a call compiles, and its seconds."""
    start, before = time.perf_counter(), len(_compiled)
    call()
    return {
        "programs": len(_compiled) - before,
        "seconds": time.perf_counter() - start,
    }


_compiled: list[str] = []


def _listen(event: str, seconds: float, **details: Any) -> None:
    if event == COMPILED:
        _compiled.append(event)


def measure(steps: int, shape: Mapping[str, Any] = SHAPE) -> dict[str, Any]:
    """Everything that the result holds."""
    model = models.make(models.DecoderConfig(**shape))
    params = model.init(jax.random.key(0))
    tokens = np.random.default_rng(0).integers(3, shape["vocab"], size=(64, LENGTH))
    table = {"tokens": tokens.astype(np.int32), "mask": np.ones(tokens.shape, bool)}
    tx = optax.chain(combine.weighted_sum(), optax.adamw(1e-4))
    parts = {"known": terms.on_logps(losses.nll, model, "known", reduce="token")}
    step = jax.jit(ju.make_step(parts, tx), donate_argnums=0)

    def fresh() -> ju.UnlearnState:
        return ju.init_state(params, tx, jax.random.key(0))

    def reads(state: Any, entry: Any) -> None:
        assert state is not None

    def does_not_read(state: Any, entry: Any) -> None:
        pass

    does_not_read.reads_state = False
    ju.fit(step, fresh(), data.streams({"known": table}, ROWS, seed=0), steps=2)
    found = {
        name: run_loop(step, fresh(), table, hook, steps)
        for name, hook in (("ahead", does_not_read), ("waits", reads))
    }
    jax.monitoring.register_event_duration_secs_listener(_listen)

    def relearn(rate: float, seed: int) -> None:
        how = dict(steps=2, batch_size=ROWS, learning_rate=rate, seed=seed)
        attacks.relearn(model, params, table, **how)

    found["relearn"] = {
        "first": compilations(lambda: relearn(1e-5, 0)),
        "second": compilations(lambda: relearn(2e-5, 1)),
    }
    device = jax.devices()[0].device_kind
    return {"steps": steps, "device": device, "jax": jax.__version__} | found


def main(argv: list[str] | None = None) -> None:
    """Measures and writes the result."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=20, help="of each run")
    parser.add_argument("--output", default="", help="a file for the result, JSON")
    options = parser.parse_args(argv)
    if options.steps < 2:
        parser.error("--steps must be at least 2")
    found = measure(options.steps)
    print(json.dumps(found, indent=2))
    if options.output:
        page.write_json(Path(options.output), found)


if __name__ == "__main__":
    main()
