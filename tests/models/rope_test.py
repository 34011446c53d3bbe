# SPDX-License-Identifier: Apache-2.0
"""Every kind of rotary positions equals that of transformers."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose

from jaxunlearn.models import _config, _rope

HEAD = 16
TRAINED = 32
SHORT, LONG = tuple(1 + 0.1 * i for i in range(8)), tuple(2 + 0.3 * i for i in range(8))
ROPES = {
    "default": {},
    "linear": {"factor": 4.0},
    "dynamic": {"factor": 4.0, "original_positions": TRAINED},
    "yarn": {"factor": 4.0, "original_positions": TRAINED},
    "yarn-mscale": {
        "factor": 8.0,
        "original_positions": TRAINED,
        "mscale": 0.7,
        "mscale_all_dim": 0.4,
        "beta_fast": 16.0,
        "beta_slow": 2.0,
    },
    "yarn-untruncated": {
        "factor": 4.0,
        "original_positions": 4096,
        "truncate": False,
        "attention_factor": 1.3,
    },
    "longrope": {
        "factor": 4.0,
        "original_positions": TRAINED,
        "short_factor": SHORT,
        "long_factor": LONG,
    },
    "llama3": {"factor": 8.0, "original_positions": TRAINED},
}


def make(name: str) -> _config.RopeConfig:
    return _config.RopeConfig(theta=5000.0, kind=name.split("-")[0], **ROPES[name])


def torch_rotations(rope: _config.RopeConfig, positions: np.ndarray):
    """cos and sin of a fresh LlamaRotaryEmbedding, without its doubled second half."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    from transformers.models.llama import modeling_llama

    given = {
        name: value
        for name, value in dataclasses.asdict(rope).items()
        if value is not None and name not in ("kind", "theta", "partial")
    }
    needed = set(ROPES_KEYS[rope.kind])
    given = {name: value for name, value in given.items() if name in needed}
    if "original_positions" in given:
        given["original_max_position_embeddings"] = given.pop("original_positions")
    for name in ("short_factor", "long_factor"):
        if name in given:
            given[name] = list(given[name])
    config = transformers.LlamaConfig(
        hidden_size=4 * HEAD,
        num_attention_heads=4,
        max_position_embeddings=TRAINED,
        rope_parameters={"rope_type": rope.kind, "rope_theta": rope.theta, **given},
    )
    embedding = modeling_llama.LlamaRotaryEmbedding(config)
    cos, sin = embedding(torch.zeros(1), torch.tensor(positions, dtype=torch.long))
    return cos.numpy()[..., : HEAD // 2], sin.numpy()[..., : HEAD // 2]


_LONGER = ("factor", "original_positions", "attention_factor")
ROPES_KEYS = {
    "default": (),
    "linear": ("factor",),
    "dynamic": ("factor",),
    "yarn": (
        *_LONGER,
        "beta_fast",
        "beta_slow",
        "mscale",
        "mscale_all_dim",
        "truncate",
    ),
    "longrope": (*_LONGER, "short_factor", "long_factor"),
    "llama3": (
        "factor",
        "original_positions",
        "low_freq_factor",
        "high_freq_factor",
    ),
}


@pytest.mark.parametrize("length", [20, TRAINED, 100])
@pytest.mark.parametrize("name", ROPES)
def test_rotations_equal_transformers(name, length):
    rope = make(name)
    positions = np.stack([np.arange(length), np.maximum(np.arange(length) - 7, 0)])
    cos, sin = jax.jit(lambda p: _rope.rotations(rope, HEAD, p))(
        jnp.asarray(positions, jnp.int32)
    )
    assert cos.dtype == sin.dtype == jnp.float32
    assert cos.shape == sin.shape == (2, length, HEAD // 2)
    for row, alone in enumerate(positions):  # transformers mixes the rows of a batch
        want_cos, want_sin = torch_rotations(rope, alone[None])
        assert_allclose(cos[row], want_cos[0], atol=3e-5)
        assert_allclose(sin[row], want_sin[0], atol=3e-5)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_rotate_equals_transformers(dtype):
    torch = pytest.importorskip("torch")
    from transformers.models.llama import modeling_llama

    x = np.random.default_rng(0).normal(size=(2, 9, 3, HEAD)).astype(np.float32)
    positions = jnp.arange(9, dtype=jnp.int32)[None].repeat(2, 0)
    cos, sin = _rope.rotations(make("default"), HEAD, positions)
    ours = _rope.rotate(jnp.asarray(x, dtype), cos, sin)
    assert ours.dtype == dtype
    both = [torch.tensor(np.concatenate([a, a], -1)) for a in (cos, sin)]
    wide = torch.tensor(np.asarray(jnp.asarray(x, dtype), np.float32))
    want, _ = modeling_llama.apply_rotary_pos_emb(wide, wide, *both, unsqueeze_dim=2)
    rtol = 1e-5 if dtype == jnp.float32 else 1e-2
    assert_allclose(np.asarray(ours, np.float32), want.numpy(), rtol=rtol, atol=1e-6)


def test_rotation_keeps_lengths_and_depends_on_distance_only():
    rope = make("default")
    rng = np.random.default_rng(1)
    q, k = jnp.asarray(rng.normal(size=(2, 1, 1, 1, HEAD)), jnp.float32)

    def product(at_q, at_k):
        turned = [
            _rope.rotate(x, *_rope.rotations(rope, HEAD, jnp.full((1, 1), at)))
            for x, at in ((q, jnp.int32(at_q)), (k, jnp.int32(at_k)))
        ]
        assert_allclose(jnp.linalg.norm(turned[0]), jnp.linalg.norm(q), rtol=1e-5)
        return float(jnp.sum(turned[0] * turned[1]))

    assert_allclose(product(3, 1), product(12, 10), rtol=1e-4)
    assert abs(product(3, 1) - product(3, 2)) > 1e-3


def test_partial_rotation_leaves_the_last_units_alone():
    rope = _config.RopeConfig(partial=0.5)
    x = jnp.ones((1, 4, 2, HEAD))
    cos, sin = _rope.rotations(rope, HEAD, jnp.arange(4, dtype=jnp.int32)[None])
    turned = _rope.rotate(x, cos, sin)
    assert cos.shape[-1] == HEAD // 4
    assert_allclose(turned[..., HEAD // 2 :], 1.0)
    assert jnp.all(turned[:, 1:, :, : HEAD // 2] != 1.0)


@pytest.mark.parametrize(
    ("rope", "words"),
    [
        (_config.RopeConfig(kind="yarn"), "original_positions"),
        (_config.RopeConfig(kind="longrope", original_positions=8), "short_factor"),
        (_config.RopeConfig(partial=0.01), "rotated"),
    ],
)
def test_missing_settings_of_a_kind_are_named(rope, words):
    with pytest.raises(ValueError, match=rf"needs .*{words}.* got "):
        _rope.frequencies(rope, HEAD, 8)
