# SPDX-License-Identifier: Apache-2.0
"""The streams of `data.streams`, read ahead of the training step with grain.

    shard = (jax.process_index(), jax.process_count())
    batches = data.loader.streams(sources, 8, seed=0, shard=shard)
    state, log = ju.fit(step, state, batches, steps=1000)
    position = batches.get_state()              # small, and JSON can hold it
    ...
    batches.set_state(position)                 # of a loader with the same arguments

The batches equal those of `data.streams` bit for bit, so either can replace the other.
The order is therefore not grain's shuffle. The batch of a step depends on the step's
number only, so the position is that number, for any number of processes.

Needs grain: `pip install 'jaxunlearn[data]'`.
"""

import sys
from collections.abc import Mapping
from typing import Any

from jaxunlearn import _checks
from jaxunlearn.data import table
from jaxunlearn.typing import Streams


class Loader:
    """An endless iterator over steps, made by `streams`.

    If reading a batch fails, the error is raised and the next call tries the same batch
    again.
    """

    def __init__(self, batches: Any, origin: Mapping[str, Any]):
        self._batches, self._origin = batches, dict(origin)
        self._shapes: dict[str, dict[str, tuple]] | None = None

    def __iter__(self) -> "Loader":
        return self

    def __next__(self) -> Streams:
        position = self._batches.get_state()
        try:
            batch = next(self._batches)
        except Exception:  # grain has counted the batch that failed: step back
            self._batches.set_state(position)
            raise
        shapes = {
            stream: {column: (x.shape, str(x.dtype)) for column, x in columns.items()}
            for stream, columns in batch.items()
        }
        self._shapes = self._shapes or shapes
        if shapes != self._shapes:
            (name, *_) = [name for name in shapes if shapes[name] != self._shapes[name]]
            raise ValueError(
                f"The loader needs batches of one shape, got {self._shapes[name]} and "
                f"then {shapes[name]} for {name!r}. Pad its rows to one length."
            )
        return batch

    def get_state(self) -> dict[str, Any]:
        """The number of batches taken, with the seed, row counts and batch sizes."""
        return {"batches": self._batches.get_state()["next_index"], **self._origin}

    def set_state(self, state: Mapping[str, Any]) -> None:
        """Moves to a position from `get_state`, of any number of processes.

        Raises:
            ValueError: if the position comes from a loader with another seed, other
                batch sizes or other numbers of rows, whose batches would differ.
        """
        fix = "Pass what get_state returned."
        _checks.has_keys("set_state", "from the state", ("batches",), state, fix)
        came = {name: state.get(name) for name in self._origin}
        if came != self._origin:
            raise ValueError(
                f"set_state needs a position of a loader with {self._origin}, got one "
                f"with {came}. Restore the data and settings, or start a new run."
            )
        self._batches.set_state({"next_index": int(state["batches"])})

    def close(self) -> None:
        """Stops reading ahead."""
        self._batches.close()


def streams(
    sources: Mapping[str, table.Table | table.Source],
    batch_size: int | Mapping[str, int],
    *,
    seed: int,
    shard: tuple[int, int] = (0, 1),
    prefetch: int = 2,
    num_threads: int = 1,
) -> Loader:
    """One batch of every stream per step, endlessly, as `data.streams` yields them.

    Args:
        sources: stream name -> table or source.
        batch_size: rows per step of every stream, or a dict with one number for each
            stream; over all processes.
        seed: integer >= 0; each epoch has another order.
        shard: (process index, number of processes); each process reads only its rows,
            as in `data.streams`.
        prefetch: number of steps to read ahead; 0 reads each batch when it is needed.
        num_threads: number of steps to read in parallel. More than one helps when rows
            come from far away; the sources must then be thread-safe.
    Raises:
        ValueError, KeyError: as `data.streams`. Errors of a source are raised by the
            iterator.
        ImportError: without grain.
    """
    owner = "data.loader.streams"
    _checks.not_negative(owner, prefetch=prefetch)
    if prefetch:
        _checks.positive_int(owner, prefetch=prefetch)
    _checks.positive_int(owner, num_threads=num_threads)
    grain = _checks.library(owner, "grain", "data", ", or use data.streams")
    batch = table.batch_fn(sources, batch_size, seed=seed, shard=shard)
    options = grain.ReadOptions(
        num_threads=min(num_threads, prefetch), prefetch_buffer_size=prefetch
    )
    batches = grain.MapDataset.range(sys.maxsize).map(batch)
    origin = {
        "seed": int(seed),
        "streams": {
            name: {
                "rows": table.num_rows(source),
                "batch": batch_size[name]
                if isinstance(batch_size, Mapping)
                else batch_size,
            }
            for name, source in sources.items()
        },
    }
    return Loader(iter(batches.to_iter_dataset(options)), origin)
