# SPDX-License-Identifier: Apache-2.0
"""The benchmark of quantization on a tiny decoder: counts, errors, perplexity."""

import jax
import numpy as np
import pytest

from experiments.benchmarks import gguf, quantize
from jaxunlearn import edits
from tests import tiny


@pytest.mark.slow
def test_every_kernel_is_counted_on_rows_seen_and_unseen():
    model, params = tiny.tiny_model()
    seen, unseen = (
        [tiny.tiny_batch(8, 24, seed=seed, answer=False)] for seed in (0, 1)
    )
    found = quantize.measure(model, params, seen, unseen, group=8)
    for kind, names in quantize.KINDS.items():
        for name in names:
            row = found[kind][name]
            assert 0 < row["round_seconds"] and 0 < row["seconds"]
            for rows in ("seen", "unseen"):
                assert row[rows]["kernels"] == 7 * model.config.layers
                assert 0 < row[rows]["median_error_ratio"] < 1.1
        gptq = found[kind]["gptq"]
        assert gptq["seen"]["errs_less"] >= 0.9 * gptq["seen"]["kernels"]
        assert gptq["seen"]["median_error_ratio"] < 0.9
        assert gptq["seen"] != gptq["unseen"]


@pytest.mark.slow
def test_error_is_that_of_the_outputs():
    model, params = tiny.tiny_model()
    batch = tiny.tiny_batch(8, 24, answer=False)
    inputs = edits.collect_inputs(model, params, [batch])
    new = edits.quantize(params, "int3")
    got = quantize.errors(model, params, new, inputs)["blocks/mlp/down/kernel"]
    x = model.apply(params, batch, taps={"mlp": (0, 1, 2)}).taps["mlp"]
    x = np.where(batch["mask"][None, :, :, None], x, 0)
    kernel = [p["blocks"]["mlp"]["down"]["kernel"] for p in (new, params)]
    gap = np.einsum("nblu,nuo->nblo", x, kernel[0] - kernel[1])
    np.testing.assert_allclose(got, (gap**2).sum((1, 2, 3)), rtol=1e-3)


def test_perplexity_is_that_of_the_tokens_after_the_first():
    model, params = tiny.tiny_model()
    tokens = np.random.default_rng(0).integers(0, model.config.vocab, (3, 8))
    rows = {"tokens": tokens.astype(np.int32), "mask": np.ones((3, 8), bool)}
    rows["answer"] = rows["mask"]
    hidden = model.apply(params, rows).hidden
    logps = jax.nn.log_softmax(model.unembed(params, hidden))[:, :-1]
    wanted = np.exp(-np.mean(np.take_along_axis(logps, tokens[:, 1:, None], -1)))
    got = gguf.perplexity(model, params, rows)
    np.testing.assert_allclose(got, wanted, rtol=1e-4)
