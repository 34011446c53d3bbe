# SPDX-License-Identifier: Apache-2.0
"""Streams read ahead of the step with grain, and where they stand.

    batches = loader.streams(sources, sizes, seed=0, share=(process, processes))
    state, log = ju.fit(step, state, batches, steps=1000)
    position = batches.get_state()              # small, and JSON holds it
    ...
    batches.set_state(position)                 # of a loader made alike

The batches are those of `table.streams`, bit for bit, so that one can take the other's
place. Their order is ours and not grain's shuffle: it is drawn without grain, which
takes half a second to import, wherever data is in memory. A step's batch depends on its
number alone, so a position is that number, whatever the number of processes.
"""

import sys
from collections.abc import Mapping
from typing import Any

from jaxunlearn import _checks
from jaxunlearn.data import table
from jaxunlearn.typing import Streams

grain = _checks.library(
    "data.loader", "grain", "data", ", or read from memory by data.streams"
)


class Loader:
    """An endless iterator over streams; `streams` makes it. A batch that could not be
    read is tried again when the next one is asked for."""

    def __init__(self, batches: Any, made_of: Mapping[str, Any]):
        self._batches, self._made_of = batches, dict(made_of)
        self._shapes: dict[str, dict[str, tuple]] | None = None

    def __iter__(self) -> "Loader":
        return self

    def __next__(self) -> Streams:
        taken = self._batches.get_state()
        try:
            batch = next(self._batches)
        except Exception:  # reading ahead goes past it, and would then count one less
            self._batches.set_state(taken)
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
        """How many batches were taken, and of what: seed, rows and batch sizes."""
        return {"batches": self._batches.get_state()["next_index"], **self._made_of}

    def set_state(self, state: Mapping[str, Any]) -> None:
        """Goes to where a loader stood, on any number of processes.

        Raises:
            ValueError: if that loader had another seed, other batch sizes or streams of
                other numbers of rows: its batches would not come again.
        """
        fix = "Give what get_state returned."
        _checks.has_keys("set_state", "from the state", ("batches",), state, fix)
        came = {name: state.get(name) for name in self._made_of}
        if came != self._made_of:
            raise ValueError(
                f"The loader needs a position of one made alike, {self._made_of}, got "
                f"one of {came}. Bring the data or the settings back, or begin anew."
            )
        self._batches.set_state({"next_index": int(state["batches"])})

    def close(self) -> None:
        """Stops reading ahead."""
        self._batches.close()


def streams(
    sources: Mapping[str, table.Table | table.Source],
    sizes: Mapping[str, int] | int,
    *,
    seed: int,
    share: tuple[int, int] = (0, 1),
    ahead: int = 2,
    threads: int = 1,
) -> Loader:
    """One batch of every stream, endlessly, as `table.streams` yields them.

    Args:
        sources: stream name -> table, or a source of rows.
        sizes: batch size of every stream over all processes, or one for all.
        seed: whole number >= 0; each stream shuffles in an order of its own, a new one
            each time that it begins again.
        share: (process, processes): this process reads its own rows alone, as in
            `table.streams`.
        ahead: steps to read before they are asked for; 0 reads when asked.
        threads: that many steps are read at a time; more than one helps where rows come
            from far away, and needs sources that bear it.
    Raises:
        ValueError, KeyError: as `table.streams`. What a source raises comes from the
            iterator.
    """
    _checks.not_negative("loader.streams", ahead=ahead)
    if ahead:
        _checks.positive_int("loader.streams", ahead=ahead)
    _checks.positive_int("loader.streams", threads=threads)
    read = table.batch_fn(sources, sizes, seed=seed, share=share)
    options = grain.ReadOptions(
        num_threads=min(threads, ahead), prefetch_buffer_size=ahead
    )
    batches = grain.MapDataset.range(sys.maxsize).map(read)
    made_of = {
        "seed": int(seed),
        "streams": {
            name: {
                "rows": table.num_rows(source),
                "batch": sizes[name] if isinstance(sizes, Mapping) else sizes,
            }
            for name, source in sources.items()
        },
    }
    return Loader(iter(batches.to_iter_dataset(options)), made_of)
