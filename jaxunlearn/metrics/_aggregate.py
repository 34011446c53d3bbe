# SPDX-License-Identifier: Apache-2.0
"""Means of values, on the host in float64."""

import numpy as np

from jaxunlearn import _checks
from jaxunlearn.metrics import _common
from jaxunlearn.typing import Array

MISSING = ("error", "skip")


def mean(values: Array, *, missing: str = "error") -> float:
    """Mean over examples.

    Args:
        values: [n] float or bool. NaN marks an example that could not be measured.
        missing: "error" raises an error for NaN; "skip" leaves NaN out.
    Raises:
        ValueError: if there is no value, or NaN with "error".
    """
    _checks.one_of("mean", MISSING, missing=missing)
    values = np.asarray(values, np.float64)
    if missing == "skip":
        values = values[~np.isnan(values)]
    (values,) = _common.on_host("mean", values=values)
    return float(values.mean())


def harmonic_mean(values: Array) -> float:
    """Harmonic mean, n / sum(1 / values); exactly 0 if one value is 0.

    Args:
        values: [n] float, >= 0.
    Raises:
        ValueError: if there is no value, or one is negative or NaN.
    """
    (values,) = _common.on_host("harmonic_mean", values=values)
    if (values < 0).any():
        raise ValueError(f"harmonic_mean needs values >= 0, got {values.min()}.")
    if (values == 0).any():
        return 0.0
    return float(values.size / np.sum(1 / values))
