# SPDX-License-Identifier: Apache-2.0
"""Shapes of well-known models as DecoderConfigs, for plans and benchmarks.

There are no weights and no tokenizers here. Compute is bfloat16, parameters are
float32. The numbers are those of each model's config.json.
"""

from jaxunlearn import models

_LLAMA3 = dict(
    family="llama",
    vocab=128256,
    head_dim=128,
    kv_heads=8,
    positions=131072,
    norm_eps=1e-5,
    compute_dtype="bfloat16",
)


def _rope(factor: float) -> models.RopeConfig:
    return models.RopeConfig(
        theta=500000.0,
        kind="llama3",
        factor=factor,
        low_freq_factor=1.0,
        high_freq_factor=4.0,
        original_positions=8192,
    )


def _llama_1b() -> models.DecoderConfig:
    shape = dict(width=2048, layers=16, heads=32, hidden=8192) | dict(head_dim=64)
    return models.DecoderConfig(**(_LLAMA3 | shape), rope=_rope(32.0), tied=True)


def _llama_8b() -> models.DecoderConfig:
    shape = dict(width=4096, layers=32, heads=32, hidden=14336)
    return models.DecoderConfig(**(_LLAMA3 | shape), rope=_rope(8.0))


def _llama_70b() -> models.DecoderConfig:
    shape = dict(width=8192, layers=80, heads=64, hidden=28672)
    return models.DecoderConfig(**(_LLAMA3 | shape), rope=_rope(8.0))


def _llama_405b() -> models.DecoderConfig:
    shape = dict(width=16384, layers=126, heads=128, hidden=53248)
    return models.DecoderConfig(**(_LLAMA3 | shape), rope=_rope(8.0))


def _qwen3_8b() -> models.DecoderConfig:
    return models.DecoderConfig(
        family="qwen3",
        vocab=151936,
        width=4096,
        layers=36,
        heads=32,
        kv_heads=8,
        head_dim=128,
        hidden=12288,
        positions=40960,
        rope=models.RopeConfig(theta=1000000.0),
        qk_norm=True,
        compute_dtype="bfloat16",
    )


def _qwen3_30b_a3b() -> models.DecoderConfig:
    return models.DecoderConfig(
        family="qwen3_moe",
        vocab=151936,
        width=2048,
        layers=48,
        heads=32,
        kv_heads=4,
        head_dim=128,
        hidden=768,
        positions=40960,
        rope=models.RopeConfig(theta=1000000.0),
        qk_norm=True,
        experts=models.ExpertsConfig(num=128, per_token=8),
        compute_dtype="bfloat16",
    )


def _gemma2_9b() -> models.DecoderConfig:
    return models.DecoderConfig(
        family="gemma2",
        vocab=256000,
        width=3584,
        layers=42,
        heads=16,
        kv_heads=8,
        head_dim=256,
        hidden=14336,
        positions=8192,
        norm="rms_plus_one",
        post_norms=True,
        activation="gelu_tanh",
        embed_scale=3584**0.5,
        attention_scale=256**-0.5,
        attention_softcap=50.0,
        logit_softcap=30.0,
        windows=(4096, None) * 21,
        tied=True,
        compute_dtype="bfloat16",
    )


PRESETS: dict[str, models.DecoderConfig] = {
    "llama-3.2-1b": _llama_1b(),
    "llama-3.1-8b": _llama_8b(),
    "llama-3.1-70b": _llama_70b(),
    "llama-3.1-405b": _llama_405b(),
    "qwen3-8b": _qwen3_8b(),
    "qwen3-30b-a3b": _qwen3_30b_a3b(),
    "gemma-2-9b": _gemma2_9b(),
}
