# SPDX-License-Identifier: Apache-2.0
"""Settings of the decoder: everything that distinguishes one model family from
another."""

import dataclasses

from jaxunlearn import _checks

ROPE_KINDS = ("default", "linear", "dynamic", "yarn", "longrope", "llama3")
NORMS = ("rms", "rms_plus_one", "layer")
ACTIVATIONS = ("silu", "gelu", "gelu_tanh", "relu")
REMAT = ("none", "dots", "mlp", "full")
DTYPES = ("float32", "bfloat16", "float16")
ATTENTION = ("xla", "cudnn", "splash", "auto")


@dataclasses.dataclass(frozen=True)
class RopeConfig:
    """Rotary positions and their scaling; names follow Hugging Face's config.json.

    Attributes:
        theta: base of the geometric series of wavelengths.
        kind: one of ROPE_KINDS.
        factor: longest sequence divided by `original_positions`.
        original_positions: longest sequence of the original training, in tokens; None
            for the `positions` of the model.
        partial: fraction of each head that rotates.

    The other fields belong to one kind each: `low_freq_factor` and `high_freq_factor`
    to llama3; `beta_fast`, `beta_slow`, `mscale`, `mscale_all_dim` and `truncate` to
    yarn; `short_factor` and `long_factor` to longrope; `attention_factor` to yarn and
    longrope.
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
    """A decoder-only language model.

    Attributes:
        family: Hugging Face's `model_type`; it determines names in files, never the
            computation.
        vocab, width, layers, hidden: V, D, N and F.
        heads, kv_heads, head_dim: number of query heads, number of key-value heads
            (which divides `heads`), size of a head.
        positions: longest sequence the model is meant for, in tokens.
        norm_eps: added to the mean square (or variance) in every norm.
        rope: rotary positions; None if the model learned a table of positions.
        local_rope: rotary positions of the layers with a window, if they differ from
            those of the other layers (Gemma 3).
        position_offset: number of rows of a learned table before position 0 (OPT: 2).
        norm: "rms", "rms_plus_one" (the scale is stored minus 1, Gemma) or "layer"
            (the mean is subtracted, and there is a bias).
        post_norms: whether the outputs of attention and MLP are normed too (Gemma 2
            and 3).
        activation: of the MLP's units, one of ACTIVATIONS.
        gated: whether the units are multiplied by a second projection.
        parallel: whether attention and MLP read the same input (GPT-NeoX).
        embed_scale: factor on the embeddings, rounded to the compute dtype (Gemma).
        attention_scale: factor on q k^T; 1 / sqrt(head_dim) if None.
        attention_softcap, logit_softcap: c in c * tanh(x / c), on attention scores and
            on logits (Gemma 2).
        tied: whether the unembedding equals the embedding.
        qkv_bias, out_bias, mlp_bias: which projections add a bias.
        qk_norm: RMSNorm of queries and keys in each head (Qwen3).
        windows: for each layer, the number of tokens a query attends to, itself
            included, or None for all; None instead of the tuple if all layers attend to
            all tokens.
        compute_dtype: dtype of activations and matrix products; params keep theirs.
        remat: what the backward pass recomputes in each block: "none", "dots"
            (everything but the products with weight matrices), "mlp" (everything but
            the inputs of the MLP's activation: half of a block's FLOPs, for two arrays
            of width F) or "full".
        attention: implementation for complete sequences: "xla", correct on every
            platform; "cudnn" on NVIDIA GPUs; "splash", a Pallas kernel, on TPUs, and
            slowly on CPUs; or "auto", the kernel of the platform if it supports the
            other settings, else "xla". With "splash" and windows, real tokens must be
            contiguous. Decoding with a cache always uses "xla".
        source: text of the config.json the model came from, for saving it again.
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
    rope: RopeConfig | None = RopeConfig()
    local_rope: RopeConfig | None = None
    position_offset: int = 0
    norm: str = "rms"
    post_norms: bool = False
    activation: str = "silu"
    gated: bool = True
    parallel: bool = False
    embed_scale: float | None = None
    attention_scale: float | None = None
    attention_softcap: float | None = None
    logit_softcap: float | None = None
    tied: bool = False
    qkv_bias: bool = False
    out_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    windows: tuple[int | None, ...] | None = None
    compute_dtype: str = "float32"
    remat: str = "full"
    attention: str = "xla"
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
        _checks.one_of("DecoderConfig", ATTENTION, attention=self.attention)
        _checks.one_of("DecoderConfig", DTYPES, compute_dtype=self.compute_dtype)
        _checks.one_of("DecoderConfig", NORMS, norm=self.norm)
        _checks.one_of("DecoderConfig", ACTIVATIONS, activation=self.activation)
        factors = ("embed_scale", "attention_scale")
        for name in (*factors, "attention_softcap", "logit_softcap"):
            if getattr(self, name) is not None:
                _checks.positive("DecoderConfig", **{name: getattr(self, name)})
        if self.norm == "layer" and (self.qk_norm or self.post_norms):
            raise ValueError(
                "DecoderConfig needs norm='rms' or 'rms_plus_one' with qk_norm or "
                "post_norms, got norm='layer'."
            )
        if self.local_rope is not None and (self.rope is None or not self.windows):
            raise ValueError(
                "DecoderConfig needs rope and windows with local_rope, got "
                f"rope={self.rope} and windows={self.windows}."
            )
        if self.heads % self.kv_heads:
            raise ValueError(
                "DecoderConfig needs kv_heads that divide heads, got "
                f"kv_heads={self.kv_heads} and heads={self.heads}."
            )
        if self.windows is not None and len(self.windows) != self.layers:
            raise ValueError(
                "DecoderConfig needs one window per layer, got "
                f"{len(self.windows)} windows and layers={self.layers}."
            )

    @property
    def max_length(self) -> int:
        """Longest sequence in tokens, scaled rotary positions included."""
        if self.rope is None:
            return self.positions
        if self.rope.kind == "yarn":
            first = self.rope.original_positions or self.positions
            return max(self.positions, int(first * self.rope.factor))
        stretch = self.rope.factor if self.rope.kind in ("linear", "dynamic") else 1.0
        return int(self.positions * max(stretch, 1.0))
