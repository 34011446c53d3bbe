# SPDX-License-Identifier: Apache-2.0
"""Settings of the decoder: everything that tells one Llama-like model from another."""

import dataclasses

from jaxunlearn import _checks

ROPE_KINDS = ("default", "linear", "dynamic", "yarn", "longrope", "llama3")
REMAT = ("none", "dots", "full")
DTYPES = ("float32", "bfloat16", "float16")


@dataclasses.dataclass(frozen=True)
class RopeConfig:
    """Rotary positions and how they are stretched; field names follow Hugging Face.

    Attributes:
        theta: base of the geometric series of wavelengths.
        kind: one of ROPE_KINDS.
        factor: how many times longer than `original_positions` sequences may be.
        original_positions: length the model was first trained for; the model's own if
            None.
        partial: fraction of each head that rotates.
        The rest belong to single kinds: `low_freq_factor` and `high_freq_factor` to
        llama3; `beta_fast`, `beta_slow`, `mscale`, `mscale_all_dim` and `truncate` to
        yarn; `short_factor` and `long_factor` to longrope; `attention_factor` to yarn
        and longrope.
    """

    theta: float = 10000.0
    kind: str = "default"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_positions: int | None = None
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float | None = None
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool = True
    short_factor: tuple[float, ...] | None = None
    long_factor: tuple[float, ...] | None = None
    partial: float = 1.0

    def __post_init__(self):
        _checks.one_of("RopeConfig", ROPE_KINDS, kind=self.kind)
        _checks.positive(
            "RopeConfig", theta=self.theta, factor=self.factor, partial=self.partial
        )


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
    """One decoder-only language model.

    Attributes:
        family: Hugging Face's `model_type`; decides names in files, never the
            arithmetic.
        vocab, width, layers, hidden: V, D, N and F.
        heads, kv_heads, head_dim: query heads, key-value heads (they divide `heads`),
            head size.
        positions: longest sequence the model is meant for, in tokens.
        norm_eps: added to the mean square in every RMSNorm.
        rope: rotary positions.
        tied: whether the unembedding is the embedding.
        qkv_bias, out_bias, mlp_bias: which projections add a bias.
        qk_norm: RMSNorm of queries and keys in each head (Qwen3).
        windows: how many tokens back each layer sees, None in a layer that sees them
            all; None instead of the tuple where every layer does.
        compute_dtype: dtype of activations and of matrix products; masters stay as they
            are.
        remat: what the backward pass recomputes in each block: "none", "dots" (all but
            the results of the weight matrices) or "full".
        source: text of the config.json the model came from, kept for saving it again.
    """

    family: str
    vocab: int
    width: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    hidden: int
    positions: int
    norm_eps: float = 1e-6
    rope: RopeConfig = RopeConfig()
    tied: bool = False
    qkv_bias: bool = False
    out_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    windows: tuple[int | None, ...] | None = None
    compute_dtype: str = "float32"
    remat: str = "full"
    source: str = "{}"

    def __post_init__(self):
        _checks.positive_int(
            "DecoderConfig",
            **{
                name: getattr(self, name)
                for name in ("vocab", "width", "layers", "hidden")
            },
            **{name: getattr(self, name) for name in ("heads", "kv_heads", "head_dim")},
            positions=self.positions,
        )
        _checks.one_of("DecoderConfig", REMAT, remat=self.remat)
        _checks.one_of("DecoderConfig", DTYPES, compute_dtype=self.compute_dtype)
        if self.heads % self.kv_heads:
            raise ValueError(
                "DecoderConfig needs kv_heads that divide heads, got "
                f"kv_heads={self.kv_heads} and heads={self.heads}."
            )
        if self.windows is not None and len(self.windows) != self.layers:
            raise ValueError(
                "DecoderConfig needs one window a layer, got "
                f"{len(self.windows)} windows and layers={self.layers}."
            )

    @property
    def longest(self) -> int:
        """Longest sequence in tokens, stretched positions included."""
        if self.rope.kind == "yarn":
            first = self.rope.original_positions or self.positions
            return max(self.positions, int(first * self.rope.factor))
        stretch = self.rope.factor if self.rope.kind in ("linear", "dynamic") else 1.0
        return int(self.positions * max(stretch, 1.0))
