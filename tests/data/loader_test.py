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
@pytest.mark.parametrize("ahead, threads", [(0, 1), (2, 1), (5, 3)])
def test_the_batches_are_those_of_streams(make, ahead, threads):
    wanted = table.streams(tables(), SIZES, seed=3)
    batches = loader.streams(make(), SIZES, seed=3, ahead=ahead, threads=threads)
    for _ in range(12):  # retain begins again after 1.5 batches, forget after 1.75
        same(next(batches), next(wanted))
    batches.close()


def test_every_process_reads_its_rows_and_no_other():
    steps, whole, parts = 7, sources(), [sources(), sources()]
    one = loader.streams(whole, SIZES, seed=3, ahead=0)
    two = [
        loader.streams(part, SIZES, seed=3, share=(i, 2), ahead=0)
        for i, part in enumerate(parts)
    ]
    for _ in range(steps):
        same(next(one), joined([next(part) for part in two]))
    for name, size in SIZES.items():
        wanted = np.reshape(whole[name].read, (steps, size))
        shares = [np.reshape(part[name].read, (steps, size // 2)) for part in parts]
        assert_array_equal(np.hstack(shares), wanted)


@pytest.mark.parametrize("ahead", [0, 3])
@pytest.mark.parametrize("processes", [1, 2])
def test_a_position_goes_on_in_mid_epoch_on_any_number_of_processes(ahead, processes):
    before = loader.streams(sources(), SIZES, seed=3, share=(1, 2), ahead=ahead)
    for _ in range(3):
        next(before)
    position = json.dumps(before.get_state())
    before.close()
    assert len(position) < 200
    rest = itertools.islice(table.streams(tables(), SIZES, seed=3), 3, 9)
    after = []
    for i in range(processes):
        share = (i, processes)
        batches = loader.streams(sources(), SIZES, seed=3, share=share, ahead=ahead)
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
        {"sizes": {"forget": 4, "retain": 2}},
        {"sources": {"forget": Noted(7), "retain": Noted(10)}},
    ],
)
def test_the_position_of_another_loader_is_refused(change):
    position = loader.streams(sources(), SIZES, seed=3).get_state()
    other = loader.streams(**{"sources": sources(), "sizes": SIZES, "seed": 3} | change)
    with pytest.raises(ValueError, match="made alike.*Bring the data or the settings"):
        other.set_state(position)
    with pytest.raises(KeyError, match="reads from the state 'batches'"):
        other.set_state({})


def test_rows_that_do_not_fit_are_named():
    rows = [{"x": np.zeros(4)}, {"x": np.zeros(5)}]
    batches = loader.streams({"forget": rows}, 2, seed=0)
    with pytest.raises(ValueError, match=r"forget source needs rows of one shape, got"):
        next(batches)
    batches = loader.streams({"forget": rows}, 1, seed=0)
    with pytest.raises(ValueError, match=r"batches of one shape, got.*for 'forget'"):
        list(itertools.islice(batches, 2))
    batches = loader.streams({"forget": [b"{}"]}, 1, seed=0)
    with pytest.raises(TypeError, match="got bytes in row 0. Decode it by data.mapped"):
        next(batches)


@pytest.mark.parametrize("ahead, threads", [(0, 1), (2, 1), (4, 3)])
def test_a_batch_that_failed_is_tried_again_and_positions_stay_true(ahead, threads):
    class Broken(Noted):
        mended = False

        def __getitem__(self, row):
            if row == 3 and not self.mended:
                raise ValueError("a bad sector")
            return super().__getitem__(row)

    rows = Broken(6)
    wanted = table.streams({"forget": Noted(6)}, 1, seed=0)
    batches = loader.streams({"forget": rows}, 1, seed=0, ahead=ahead, threads=threads)
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


def test_a_position_is_json_for_numpys_numbers_too():
    batches = loader.streams({"forget": Noted(4)}, 2, seed=np.int64(3))
    position = json.loads(json.dumps(batches.get_state()))
    loader.streams({"forget": Noted(4)}, 2, seed=3).set_state(position)


def test_bad_arguments_are_named_at_once():
    with pytest.raises(ValueError, match="The forget set is empty"):
        loader.streams({"forget": []}, 2, seed=0)
    with pytest.raises(ValueError, match="2 processes can share equally, got 3 rows"):
        loader.streams({"forget": Noted(4)}, 3, seed=0, share=(0, 2))
    with pytest.raises(ValueError, match="ahead >= 0"):
        loader.streams({"forget": Noted(4)}, 2, seed=0, ahead=-1)
    with pytest.raises(TypeError, match="whole number ahead, got ahead=1.5"):
        loader.streams({"forget": Noted(4)}, 2, seed=0, ahead=1.5)


def test_without_grain_the_rest_of_data_works_and_the_loader_says_what_to_install():
    program = (
        "import sys; sys.modules['grain'] = None; from jaxunlearn import data\n"
        "print(next(data.streams({'a': {'x': [1]}}, 1, seed=0)))\n"
        "from jaxunlearn.data import loader"
    )
    run = [sys.executable, "-c", program]
    done = subprocess.run(run, capture_output=True, text=True, check=False)
    assert "{'a': {'x': array([1])}}" in done.stdout
    assert "ImportError: data.loader needs the library grain" in done.stderr
    assert "pip install 'jaxunlearn[data]'" in done.stderr
