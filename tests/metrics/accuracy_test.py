# SPDX-License-Identifier: Apache-2.0
"""Infinite scores of multiple choice."""

import numpy as np

from jaxunlearn import metrics


def test_a_tie_of_infinities_is_never_right():
    inf = np.inf
    scores = [
        [-inf, -inf, -inf],
        [inf, inf, 1],
        [inf, 1, 2],
        [-inf, 1, -inf],
        [3, 3, 1],
    ]
    labels = [0, 0, 0, 1, 0]
    found = metrics.choice_accuracy(np.array(scores, np.float32), np.array(labels))
    np.testing.assert_array_equal(found, [0, 0, 1, 1, 1])
    options = np.array([[True, False, False]] + [[True, True, True]] * 4)
    found = metrics.choice_accuracy(
        np.array(scores, np.float32), np.array(labels), where=options
    )
    np.testing.assert_array_equal(found, [1, 0, 1, 1, 1])
    found = metrics.choice_accuracy(
        np.array(scores, np.float32), np.array(labels), calibrated=True
    )
    assert np.isnan(found).all()  # a mean with infinities calibrates nothing
