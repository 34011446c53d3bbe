# SPDX-License-Identifier: Apache-2.0
"""The benchmark of quantization counts what it says, on a tiny decoder."""

import numpy as np

from experiments.benchmarks import quantize
from jaxunlearn import edits
from tests import tiny


def test_every_kernel_is_counted():
    model, params = tiny.tiny_model()
    batches = [tiny.tiny_batch(8, 24, answer=False)]
    found = quantize.measure(model, params, batches, group=8)
    for kind in quantize.KINDS:
        own = found[kind]
        assert own["kernels"] == 7 * model.config.layers
        assert own["gptq_errs_less"] >= 0.9 * own["kernels"]
        assert own["median_error_ratio"] < 0.9
        assert 0 < own["quantize_seconds"] and 0 < own["gptq_seconds"]


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
