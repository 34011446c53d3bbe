# SPDX-License-Identifier: Apache-2.0
"""Losses and gradients in bfloat16, compared with torch's autocast to bfloat16."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxunlearn import losses
from jaxunlearn.io import hf

torch = pytest.importorskip("torch")

SIZES = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 4}


def test_gradients_in_bfloat16_err_no_more_than_torchs_autocast(torch_model, tmp_path):
    """The error is the distance to float32 gradients, over their norm."""
    reference = torch_model("llama", tie_word_embeddings=True, **SIZES)
    reference.save_pretrained(tmp_path)
    tokens = np.random.default_rng(0).integers(0, 96, (8, 32))

    def theirs(low):
        with torch.autocast("cpu", torch.bfloat16, enabled=low):
            given = torch.tensor(tokens)
            loss = reference(input_ids=given, labels=given).loss
        reference.zero_grad()
        loss.backward()
        grads = [p.grad.numpy().copy() for p in reference.parameters()]
        return loss.item(), grads

    def ours(dtype):
        model, params, _ = hf.load(tmp_path, compute_dtype=dtype)
        batch = {
            "tokens": jnp.asarray(tokens, jnp.int32),
            "mask": jnp.ones(tokens.shape, jnp.bool_),
        }

        def loss(params):
            hidden = model.apply(params, batch).hidden[:, :-1]
            logits = model.unembed(params, hidden)
            return -jnp.mean(losses.token_logps(logits, batch["tokens"][:, 1:]))

        value, grads = jax.jit(jax.value_and_grad(loss))(params)
        return float(value), [np.asarray(leaf) for leaf in jax.tree.leaves(grads)]

    def error(run):
        (exact, exact_grads), (low, low_grads) = run
        pairs = list(zip(low_grads, exact_grads, strict=True))
        off = sum(float(np.sum((a - b) ** 2)) for a, b in pairs)
        return abs(low - exact), (
            off / sum(float(np.sum(b**2)) for _, b in pairs)
        ) ** 0.5

    values = ours("float32"), ours("bfloat16")
    others = theirs(False), theirs(True)
    assert abs(values[0][0] - others[0][0]) < 1e-4
    mine, torchs = error(values), error(others)
    assert 0 < mine[1] <= torchs[1]
    # One loss may be right by chance; torch's autocast errs by about 1 % here.
    assert mine[0] <= max(torchs[0], 0.01 * others[0][0])
