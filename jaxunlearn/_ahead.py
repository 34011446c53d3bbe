# SPDX-License-Identifier: Apache-2.0
"""Reading results while the device computes the next ones."""

from collections.abc import Iterable, Iterator
from typing import TypeVar

Started = TypeVar("Started")


def one_behind(results: Iterable[Started]) -> Iterator[Started]:
    """Each result, after the one that follows it was started.

    JAX returns an array before it is computed, and only reading it waits. In a loop
    that reads every result at once, the device has nothing to do while the host reads
    it and prepares the next batch. Here it computes the next result meanwhile. Two
    results are in memory at a time.

    Args:
        results: started when they are taken from it, such as calls of a jitted
            function.
    """
    results = iter(results)
    for last in results:
        for result in results:
            yield last
            last = result
        yield last
