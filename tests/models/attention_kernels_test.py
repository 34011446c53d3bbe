# SPDX-License-Identifier: Apache-2.0
"""Attention kernels give what XLA's form gives, and are refused where they cannot.

Splash runs in Pallas' interpreter here. cuDNN's kernel cannot run: it is lowered for
CUDA and its call is read.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose

from jaxunlearn import plan, sharding
from jaxunlearn.models import _attention, _kernels
from tests import tiny

pytestmark = pytest.mark.slow  # nearly every test compiles a model


def drawn(rows=4, length=140, heads=4, kv_heads=2, size=8, dtype=jnp.float32):
    rng = np.random.default_rng(0)
    shapes = [(rows, length, n, size) for n in (heads, kv_heads, kv_heads)]
    return [jnp.asarray(2 * rng.normal(size=shape), dtype) for shape in shapes]


def masked(side, rows=4, length=140):
    return tiny.tiny_batch(rows, length, side=side)["mask"]


def plain(q, k, v, mask, *, window=None, scale=0.3, softcap=None):
    positions = jnp.maximum(jnp.cumsum(mask, axis=1, dtype=jnp.int32) - 1, 0)
    visible = _attention.causal(mask)
    if window is not None:
        visible &= positions[:, :, None] - positions[:, None, :] < window
    return _attention.attend(q, k, v, visible=visible, scale=scale, softcap=softcap)


def with_gradients(function, q, k, v, mask):
    """Its values and gradients, padded queries left out."""
    real = mask[:, :, None, None]

    def loss(q, k, v):
        mixed = jnp.where(real, function(q, k, v, mask), 0.0)
        return jnp.sum(jnp.sin(mixed)), mixed

    run = jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True))
    (_, mixed), grads = run(q, k, v)
    return mixed, *grads


def compare(got, wanted):
    for a, b in zip(got, wanted, strict=True):
        assert_allclose(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "side, window, softcap",
    [("right", None, None), ("left", 5, 2.0)],
)
def test_splash_equals_xla(side, window, softcap):
    mask, arrays = masked(side), drawn()
    given = dict(window=window, softcap=softcap, scale=0.3)
    splash = partial(_kernels.splash, interpret=True, **given)
    wanted = with_gradients(partial(plain, **given), *arrays, mask)
    compare(with_gradients(splash, *arrays, mask), wanted)


@pytest.mark.parametrize("kv_heads, rows", [(2, 4), (1, 3)])
def test_splash_on_a_mesh_equals_xla(kv_heads, rows):
    # Two heads over two parts; one head repeated, and rows that do not divide.
    mask, arrays = masked("left", rows), drawn(rows, kv_heads=kv_heads)
    wanted = with_gradients(plain, *arrays, mask)
    splash = partial(_kernels.splash, interpret=True, scale=0.3)
    mesh = sharding.make_mesh(data=2, fsdp=2, tensor=2)
    with jax.set_mesh(mesh):
        got = with_gradients(partial(_kernels.per_device, splash), *arrays, mask)
    compare(got, wanted)


def test_the_decoder_has_the_same_gradients_with_splash():
    windows = (3, None, 3)
    batch = tiny.tiny_batch(side="left")
    grads = {}
    for name in ("xla", "splash"):
        model, params = tiny.tiny_model(attention=name, windows=windows)

        def loss(params, model=model):
            hidden = model.apply(params, batch).hidden
            return jnp.sum(jnp.where(batch["mask"][..., None], hidden, 0.0) ** 2)

        grads[name] = jax.jit(jax.grad(loss))(params)
    jax.tree.map(
        partial(assert_allclose, rtol=1e-3, atol=1e-4), grads["splash"], grads["xla"]
    )


@pytest.mark.parametrize("window", [None, 130, 513, 514, 700])
def test_a_plan_counts_the_tiles_that_splash_runs(window):
    from jax.experimental.pallas.ops.tpu import splash_attention as pallas

    rows, length, heads, size = 2, 2048, 2, 16
    shapes = [jax.ShapeDtypeStruct((rows, length, heads, size), jnp.float32)] * 3
    mask = jax.ShapeDtypeStruct((rows, length), jnp.bool_)
    run = partial(_kernels.splash, scale=1.0, window=window, interpret=True)
    square = (length, length)
    visible = pallas.CausalMask(square)
    if window is not None:
        visible = pallas.LocalMask(square, (window - 1, 0), 0)
    blocks = pallas.BlockSizes(block_q=512, block_kv=512)
    kernel = pallas.make_splash_mha(
        pallas.MultiHeadMask([visible]),
        head_shards=1,
        q_seq_shards=1,
        block_sizes=blocks,
    )
    tiles = int(np.count_nonzero(np.asarray(kernel.fwd_mask_info.block_mask)))
    wanted = tiles * rows * heads * 2 * 2 * 512 * 512 * size
    assert plan.dot_flops(jax.make_jaxpr(run)(*shapes, mask)) == wanted
    on = partial(_kernels.per_device, run)
    with jax.set_mesh(
        sharding.make_mesh(data=2, fsdp=1, tensor=2, devices=jax.devices()[:4])
    ):
        assert plan.dot_flops(jax.make_jaxpr(on)(*shapes, mask)) == wanted


@pytest.fixture
def cuda(monkeypatch):
    """As if cuDNN were found: enough to trace and lower its calls."""
    from jax._src.cudnn import fused_attention_stablehlo as stablehlo

    monkeypatch.setattr(stablehlo, "check_cudnn_version", lambda: 91100)


@pytest.mark.parametrize("window", [None, 6])
def test_cudnn_is_called_with_lengths_and_the_window(cuda, window):
    arrays, mask = drawn(length=16, dtype=jnp.bfloat16), masked("left", length=16)

    def loss(q, k, v, mask):
        order = _kernels.real_first(mask)
        mixed = _kernels.cudnn(q, k, v, order, scale=0.3, window=window)
        return jnp.sum(mixed.astype(jnp.float32))

    traced = jax.jit(jax.grad(loss, argnums=(0, 1, 2))).trace(*arrays, mask)
    text = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert "__cudnn$fmhaSoftmax" in text and "__cudnn$fmhaSoftmaxBackward" in text
    assert "PADDING_CAUSAL" in text
    assert f'"sliding_window_length\\22: {window or 0}' in text.replace("\\22s", '"s')


def test_real_tokens_move_to_the_front_and_back():
    mask = jnp.array([[0, 0, 1, 1], [1, 0, 1, 0], [0, 0, 0, 0]], jnp.bool_)
    forth, back, lengths = _kernels.real_first(mask)
    assert forth.tolist() == [[2, 3, 0, 1], [0, 2, 1, 3], [0, 1, 2, 3]]
    assert lengths.tolist() == [2, 2, 1]
    x = jnp.arange(12).reshape(3, 4)
    assert _kernels._take(_kernels._take(x, forth), back).tolist() == x.tolist()


def on(platform, monkeypatch):
    monkeypatch.setattr(sharding, "platform", lambda: platform)


@pytest.mark.parametrize(
    "platform, setting, wanted",
    [
        ("cpu", {}, "xla"),
        ("tpu", {}, "splash"),
        ("tpu", {"compute_dtype": "float16"}, "xla"),
        ("gpu", {}, "xla"),  # float32
        ("gpu", {"compute_dtype": "bfloat16", "attention_softcap": 50.0}, "xla"),
    ],
)
def test_auto_selects_the_kernel_of_the_platform(
    monkeypatch, platform, setting, wanted
):
    on(platform, monkeypatch)
    model, _ = tiny.tiny_model(attention="auto", **setting)
    assert _kernels.choose(model.config) == wanted


@pytest.mark.parametrize(
    "name, setting, platform, message",
    [
        ("cudnn", {}, "gpu", "compute_dtype 'bfloat16' or 'float16', got 'float32'"),
        (
            "cudnn",
            {"attention_softcap": 50.0, "compute_dtype": "bfloat16"},
            "gpu",
            "without a cap, got attention_softcap=50.0",
        ),
        ("cudnn", {"compute_dtype": "bfloat16"}, "cpu", "NVIDIA GPU, got a cpu"),
        ("splash", {}, "gpu", "needs a TPU .* got a gpu"),
        ("splash", {"compute_dtype": "float16"}, "tpu", "got 'float16'"),
    ],
)
def test_a_kernel_that_cannot_run_is_an_error(
    monkeypatch, name, setting, platform, message
):
    on(platform, monkeypatch)
    model, _ = tiny.tiny_model(attention=name, **setting)
    with pytest.raises(ValueError, match=message):
        _kernels.choose(model.config)


def test_kernels_refuse_sharded_sequences():
    model, _ = tiny.tiny_model(attention="splash")
    auto, _ = tiny.tiny_model(attention="auto")
    with jax.set_mesh(sharding.make_mesh(context=2)):
        with pytest.raises(ValueError, match="a mesh with context=2"):
            _kernels.choose(model.config)
        assert _kernels.choose(auto.config) == "xla"
    with pytest.raises(ValueError, match="attention"):
        tiny.tiny_model(attention="flash")
