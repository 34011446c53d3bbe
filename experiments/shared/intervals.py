# SPDX-License-Identifier: Apache-2.0
"""Spreads over seeds, 95% intervals, and what they decide.

An interval is a list [value, low, high]. A verdict is "holds", "fails" or "undecided":
undecided where the interval contains the bar.
"""

import functools
import math
import statistics
from collections.abc import Callable, Sequence

import numpy as np

Z = 1.96  # of a 95% interval


def spread(values: Sequence[float], *, ddof: int = 1) -> list[float]:
    """[mean, standard deviation]; the deviation of a single value is 0.

    Args:
        values: one a seed.
        ddof: 1 divides by n - 1 (sample deviation), 0 by n.
    """
    values = [float(value) for value in values]
    if len(values) < 2:
        return [statistics.mean(values), 0.0]
    deviation = statistics.stdev if ddof else statistics.pstdev
    return [statistics.mean(values), deviation(values)]


def wilson(hits: np.ndarray) -> list[float]:
    """[fraction, low, high] of boolean hits [n], Wilson's 95% interval."""
    n, p, z = hits.size, float(hits.mean()), Z
    middle = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return [p, max(0.0, middle - half), min(1.0, middle + half)]


def bootstrap(
    function: Callable[..., np.ndarray], *columns: np.ndarray, draws: int = 4000
) -> list[float] | None:
    """[value, low, high]: the 2.5 and 97.5 percentiles over resampled columns.

    Args:
        function: of as many arrays as given. It reduces their last axis, and works
            element by element over an axis of draws before it.
        columns: each [..., n]; the n columns of each array are resampled together, and
            each array by itself. For a paired interval give one array whose columns are
            the pairs.
        draws: number of resamples, always from the same seed.
    Returns:
        None where the value is not a number.
    """
    value = float(function(*columns))
    if math.isnan(value):
        return None
    rows = _resamples(tuple(x.shape[-1] for x in columns), draws)
    found = function(*(x[..., row] for x, row in zip(columns, rows, strict=True)))
    low, high = np.nanpercentile(found, (2.5, 97.5))
    return [value, float(low), float(high)]


@functools.lru_cache(maxsize=8)
def _resamples(sizes: tuple[int, ...], draws: int) -> list[np.ndarray]:
    """[draws, n] indices for each size n; the sizes take turns in every draw."""
    rng = np.random.default_rng(0)
    if len(sizes) == 1:
        return [rng.integers(0, sizes[0], (draws, sizes[0]))]
    drawn = [[rng.integers(0, n, n) for n in sizes] for _ in range(draws)]
    return [np.stack(each) for each in zip(*drawn, strict=True)]


def verdict(interval: Sequence[float], bar: float) -> str:
    """Whether a value is above the bar, as far as its interval decides."""
    _, low, high = interval
    return "holds" if low > bar else "fails" if high < bar else "undecided"


def much_larger(interval: Sequence[float], size: float) -> str:
    """Whether a difference is at least `size`, as far as its interval decides.

    It holds if the value is `size` or more and the interval is above 0; it fails if the
    interval is below `size`.
    """
    value, low, high = interval
    if value >= size and low > 0:
        return "holds"
    return "fails" if high < size else "undecided"


def on_every_seed(differences: Sequence[float]) -> str:
    """ "holds" if every seed's difference is above 0, "fails" if each is below 0.

    It is "undecided" otherwise, and with a single seed.
    """
    if len(differences) > 1 and min(differences) > 0:
        return "holds"
    if len(differences) > 1 and max(differences) < 0:
        return "fails"
    return "undecided"
