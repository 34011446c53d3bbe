# SPDX-License-Identifier: Apache-2.0
"""Batches through grain: those of table.streams, in shares, from any position."""

import itertools
import json
import subprocess
import sys

import numpy as np
import pytest
from numpy.testing import assert_array_equal

from jaxunlearn.data import loader, table

SIZES = {"forget": 4, "retain": 6}
COUNTS = {"forget": 7, "retain": 9}


class Noted:
    """Rows by number; writes down which were read."""

    def __init__(self, count):
        self.count, self.read = count, []

    def __len__(self):
        return self.count

    def __getitem__(self, row):
        self.read.append(row)
        return {"row": row, "tokens": np.full(3, row, np.int32)}


def sources():
    return {name: Noted(count) for name, count in COUNTS.items()}


def tables():
    return {
        name: table.select(source, range(len(source)))
        for name, source in sources().items()
    }


def same(a, b):
    assert a.keys() == b.keys()
    for stream, columns in a.items():
        assert columns.keys() == b[stream].keys()
        for name, column in columns.items():
            assert_array_equal(column, b[stream][name], strict=True)


def joined(parts):
    return {
        stream: {
            name: np.concatenate([part[stream][name] for part in parts])
            for name in columns
        }
        for stream, columns in parts[0].items()
    }


@pytest.mark.parametrize("make", [sources, tables])
@pytest.mark.parametrize("prefetch, threads", [(0, 1), (2, 1), (5, 3)])
def test_the_batches_are_those_of_streams(make, prefetch, threads):
    wanted = table.streams(tables(), SIZES, seed=3)
    batches = loader.streams(
        make(), SIZES, seed=3, prefetch=prefetch, num_threads=threads
    )
    for _ in range(12):  # retain begins again after 1.5 batches, forget after 1.75
        same(next(batches), next(wanted))
    batches.close()


def test_every_process_reads_only_its_rows():
    steps, full, parts = 7, sources(), [sources(), sources()]
    one = loader.streams(full, SIZES, seed=3, prefetch=0)
    two = [
        loader.streams(part, SIZES, seed=3, shard=(i, 2), prefetch=0)
        for i, part in enumerate(parts)
    ]
    for _ in range(steps):
        same(next(one), joined([next(part) for part in two]))
    for name, size in SIZES.items():
        wanted = np.reshape(full[name].read, (steps, size))
        shares = [np.reshape(part[name].read, (steps, size // 2)) for part in parts]
        assert_array_equal(np.hstack(shares), wanted)


@pytest.mark.parametrize("prefetch", [0, 3])
@pytest.mark.parametrize("processes", [1, 2])
def test_a_run_resumes_within_an_epoch_on_any_number_of_processes(prefetch, processes):
    before = loader.streams(sources(), SIZES, seed=3, shard=(1, 2), prefetch=prefetch)
    for _ in range(3):
        next(before)
    position = json.dumps(before.get_state())
    before.close()
    assert len(position) < 200
    rest = itertools.islice(table.streams(tables(), SIZES, seed=3), 3, 9)
    after = []
    for i in range(processes):
        shard = (i, processes)
        batches = loader.streams(
            sources(), SIZES, seed=3, shard=shard, prefetch=prefetch
        )
        next(batches)  # what was taken before does not matter
        batches.set_state(json.loads(position))
        after.append(batches)
    for wanted in rest:
        same(joined([next(part) for part in after]), wanted)
    assert after[0].get_state() == json.loads(position) | {"batches": 9}
    for part in after:
        part.close()


@pytest.mark.parametrize(
    "change",
    [
        {"seed": 4},
        {"batch_size": {"forget": 4, "retain": 2}},
        {"sources": {"forget": Noted(7), "retain": Noted(10)}},
    ],
)
def test_the_position_of_another_loader_is_refused(change):
    position = loader.streams(sources(), SIZES, seed=3).get_state()
    other = loader.streams(
        **{"sources": sources(), "batch_size": SIZES, "seed": 3} | change
    )
    with pytest.raises(
        ValueError, match="set_state needs a position.*Restore the data and settings"
    ):
        other.set_state(position)
    with pytest.raises(KeyError, match="reads from the state 'batches'"):
        other.set_state({})


def test_rows_of_other_shapes_are_named():
    rows = [{"x": np.zeros(4)}, {"x": np.zeros(5)}]
    batches = loader.streams({"forget": rows}, 2, seed=0)
    with pytest.raises(ValueError, match=r"forget source needs rows of one shape, got"):
        next(batches)
    batches = loader.streams({"forget": rows}, 1, seed=0)
    with pytest.raises(ValueError, match=r"batches of one shape, got.*for 'forget'"):
        list(itertools.islice(batches, 2))
    batches = loader.streams({"forget": [b"{}"]}, 1, seed=0)
    with pytest.raises(
        TypeError, match="got bytes in row 0. Decode rows with data.mapped"
    ):
        next(batches)


@pytest.mark.parametrize("prefetch, threads", [(0, 1), (2, 1), (4, 3)])
def test_a_failed_batch_is_read_again_and_positions_stay_correct(prefetch, threads):
    class Broken(Noted):
        mended = False

        def __getitem__(self, row):
            if row == 3 and not self.mended:
                raise ValueError("a bad sector")
            return super().__getitem__(row)

    rows = Broken(6)
    wanted = table.streams({"forget": Noted(6)}, 1, seed=0)
    batches = loader.streams(
        {"forget": rows}, 1, seed=0, prefetch=prefetch, num_threads=threads
    )
    taken = 0
    while (want := next(wanted))["forget"]["row"] != 3:
        same(next(batches), want)
        taken += 1
    assert 0 < taken < 6
    for _ in range(2):
        with pytest.raises(ValueError, match="a bad sector"):
            next(batches)
        assert batches.get_state()["batches"] == taken
    rows.mended = True
    for late in itertools.chain([want], itertools.islice(wanted, 3)):
        same(next(batches), late)
    assert batches.get_state()["batches"] == taken + 4
    batches.close()


def test_a_position_is_json_for_numpy_numbers_too():
    batches = loader.streams({"forget": Noted(4)}, 2, seed=np.int64(3))
    position = json.loads(json.dumps(batches.get_state()))
    loader.streams({"forget": Noted(4)}, 2, seed=3).set_state(position)


def test_bad_arguments_are_named_at_once():
    with pytest.raises(ValueError, match="The forget set is empty"):
        loader.streams({"forget": []}, 2, seed=0)
    with pytest.raises(ValueError, match="2 processes divide, got batch_size=3"):
        loader.streams({"forget": Noted(4)}, 3, seed=0, shard=(0, 2))
    with pytest.raises(ValueError, match="prefetch >= 0"):
        loader.streams({"forget": Noted(4)}, 2, seed=0, prefetch=-1)
    with pytest.raises(TypeError, match="prefetch=1.5"):
        loader.streams({"forget": Noted(4)}, 2, seed=0, prefetch=1.5)


def test_data_models_and_io_import_with_the_core_dependencies_only():
    optional = (
        "grain pyarrow tensorflow_datasets array_record PIL transformers tokenizers "
        "safetensors huggingface_hub gguf orbax tqdm scipy"
    ).split()
    program = (
        f"import sys; sys.modules.update(dict.fromkeys({optional}))\n"
        "from jaxunlearn import data, io, models\n"
        "import jaxunlearn.io.hf\n"
        "print(next(data.streams({'a': {'x': [1]}}, 1, seed=0)))\n"
        "data.loader.streams({'a': {'x': [1]}}, 1, seed=0)"
    )
    run = [sys.executable, "-c", program]
    done = subprocess.run(run, capture_output=True, text=True, check=False)
    assert "{'a': {'x': array([1])}}" in done.stdout
    assert "ImportError: data.loader.streams needs" in done.stderr
    assert "pip install 'jaxunlearn[data]'" in done.stderr
