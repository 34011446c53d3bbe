# SPDX-License-Identifier: Apache-2.0
"""evaluate.kl_from against plain NumPy."""

import jax
import numpy as np
import pytest
from numpy.testing import assert_allclose

from jaxunlearn import evaluate, terms
from tests import tiny


def test_kl_from_is_the_mean_over_the_tokens_that_count():
    rows = {name: np.array(x) for name, x in tiny.tiny_batch(rows=7).items()}
    model, ref_params = tiny.bigram_model()
    params = jax.tree.map(lambda x: 0.9 * x, ref_params)
    damage = evaluate.kl_from(model, ref_params, rows, batch_size=4)
    assert abs(damage(ref_params)) < 1e-6

    def log_softmax(params):
        logits = model.unembed(params, model.apply(params, rows).hidden)
        return np.asarray(jax.nn.log_softmax(logits), np.float64)[:, :-1]

    log_q, log_p = log_softmax(ref_params), log_softmax(params)
    each = (np.exp(log_q) * (log_q - log_p)).sum(-1)
    _, counts = terms.target_logps(model, params, rows)
    assert_allclose(damage(params), each[np.asarray(counts)].mean(), rtol=1e-5)
    with pytest.raises(ValueError, match="at least one token that counts"):
        evaluate.kl_from(model, params, rows | {"answer": rows["answer"] & False})
