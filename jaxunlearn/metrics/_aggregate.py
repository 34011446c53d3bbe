# SPDX-License-Identifier: Apache-2.0
"""Many values as one, on the host in float64."""

import numpy as np

from jaxunlearn import _checks
from jaxunlearn.metrics import _common
from jaxunlearn.typing import Array

MISSING = ("error", "skip")


def mean(values: Array, *, missing: str = "error") -> float:
    """Mean over examples.

    Args:
        values: [n] float or bool.
        missing: what to do with NaN, which marks an example that could not be measured:
            "error", or "skip" to leave it out of sum and count.
    Raises:
        ValueError: if there is nothing to average, or NaN under "error".
    """
    _checks.one_of("mean", MISSING, missing=missing)
    values = np.asarray(values, np.float64)
    if missing == "skip":
        values = values[~np.isnan(values)]
    (values,) = _common.on_host("mean", values=values)
    return float(values.mean())


def harmonic_mean(values: Array) -> float:
    """n / sum(1 / values); exactly 0 if one of them is.

    Args:
        values: [n] float, >= 0.
    Raises:
        ValueError: if there is none, or one is negative or NaN.
    """
    (values,) = _common.on_host("harmonic_mean", values=values)
    if (values < 0).any():
        raise ValueError(
            f"harmonic_mean needs values >= 0, got {values.min()} among {values.size}."
        )
    if (values == 0).any():
        return 0.0
    return float(values.size / np.sum(1 / values))
