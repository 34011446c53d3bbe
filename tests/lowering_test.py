# SPDX-License-Identifier: Apache-2.0
"""Programs for GPUs and TPUs are lowered here, where there is neither.

Lowering runs everything but the platform's compiler: it finds shapes, dtypes, kernels
and memory kinds that the platform does not have. tests/layouts_test.py lowers steps
with host memory and small moments, and offloaded products.
"""

import jax
import pytest

from jaxunlearn import losses, sharding, terms
from jaxunlearn.models import _kernels
from tests import tiny

SETTINGS = dict(
    width=256, heads=2, kv_heads=1, head_dim=128, compute_dtype="bfloat16", layers=2
)


def lowered(platform, monkeypatch, **settings):
    """The text of the gradient of a decoder's loss for a platform."""
    from jax._src.cudnn import fused_attention_stablehlo as stablehlo

    monkeypatch.setattr(stablehlo, "check_cudnn_version", lambda: 91100)
    monkeypatch.setattr(_kernels, "choose", lambda config: config.attention)
    monkeypatch.setattr(sharding, "platform", lambda: platform)
    model, params = tiny.tiny_model(**SETTINGS, **settings)
    term = terms.on_logps(losses.nll, model, "x", reduce="token")

    def loss(params, batch):
        total, _ = term(params, {"x": batch}, None, jax.random.key(0))
        return total.mean()

    batch = tiny.tiny_batch(2, 40, side="left")
    shapes = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), (params, batch)
    )
    name = {"gpu": "cuda"}.get(platform, platform)
    traced = jax.jit(jax.grad(loss)).trace(*shapes)
    return traced.lower(lowering_platforms=(name,)).as_text()


@pytest.mark.parametrize("windows", [None, (8, None)])
def test_a_step_with_cudnns_attention_lowers_for_cuda(monkeypatch, windows):
    text = lowered("gpu", monkeypatch, attention="cudnn", windows=windows)
    assert "__cudnn$fmhaSoftmaxBackward" in text
    if windows is not None:
        assert "sliding_window_length" in text and "stablehlo.case" in text


@pytest.mark.parametrize("windows", [None, (8, None)])
def test_a_step_with_splash_attention_lowers_for_tpus(monkeypatch, windows):
    text = lowered("tpu", monkeypatch, attention="splash", windows=windows)
    assert "tpu_custom_call" in text


@pytest.mark.parametrize("platform", ["gpu", "tpu"])
@pytest.mark.parametrize("remat", ["full", "mlp", "dots", "offload"])
def test_every_remat_policy_lowers(monkeypatch, platform, remat):
    text = lowered(platform, monkeypatch, remat=remat)
    assert ("pinned_host" in text) == (remat == "offload")
