# SPDX-License-Identifier: Apache-2.0
"""The benchmark of the loop counts reads, and reads a trace."""

import jax
import pytest

from experiments.benchmarks import loop


def span(name, thread, start, seconds):
    return {"ph": "X", "name": name, "tid": thread, "ts": start, "dur": seconds}


def test_a_trace_tells_which_steps_were_started_before_the_last_one_ended():
    starts, programs = (0, 10, 150), ((20, 80), (102, 40), (170, 30))
    events = [span("PjitFunction(step)", 1, start, 5) for start in starts]
    events += [span(loop.EXECUTED, 2, *program) for program in programs]
    events += [span(loop.EXECUTED, 1, 0, 1), {"ph": "M", "name": "a thread"}]
    assert loop._of_trace(events, 3) == {
        "started_before_the_last_ended": 1,
        "of": 2,
        "gap_ms": pytest.approx((2 + 28) / 2 / 1e3),
    }
    assert loop._of_trace(events[3:], 3) is None


@pytest.mark.slow
def test_the_counts_of_a_tiny_model():
    shape = loop.SHAPE | dict(vocab=32, width=16, layers=1, heads=2, kv_heads=2)
    shape |= dict(head_dim=8, hidden=24)
    with jax.numpy_dtype_promotion("standard"):  # optax.adamw needs it
        found = loop.measure(4, shape)
    assert found["ahead"]["reads_per_step"] == found["waits"]["reads_per_step"] == 1
    assert found["ahead"]["reads_without_work_per_step"] == 1 / 4
    assert found["waits"]["reads_without_work_per_step"] == 1
    assert found["relearn"]["first"]["programs"] > 0
    assert found["relearn"]["second"]["programs"] == 0
