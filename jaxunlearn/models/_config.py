# SPDX-License-Identifier: Apache-2.0
"""Settings of the decoder: everything that tells one family of models from another."""

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
        norm_eps: added to the mean square (or variance) in every norm.
        rope: rotary positions; None where the model learned a table of positions.
        local_rope: rotary positions of the layers that have a window, where they differ
            from the others' (Gemma 3).
        position_offset: rows of a learned table before that of position 0 (OPT: 2).
        norm: "rms", "rms_plus_one" (scale is stored minus 1, Gemma) or "layer" (mean
            subtracted, with a bias).
        post_norms: whether what attention and MLP add is normed too (Gemma 2 and 3).
        activation: of the MLP's units, one of ACTIVATIONS.
        gated: whether the units are multiplied by a second projection.
        parallel: whether attention and MLP read the same input (GPT-NeoX).
        embed_scale: factor on the embeddings, rounded to the compute dtype (Gemma).
        attention_scale: factor on q k^T; 1 / sqrt(head_dim) if None.
        attention_softcap, logit_softcap: c in c * tanh(x / c), on attention scores and
            on logits (Gemma 2).
        tied: whether the unembedding is the embedding.
        qkv_bias, out_bias, mlp_bias: which projections add a bias.
        qk_norm: RMSNorm of queries and keys in each head (Qwen3).
        windows: how many tokens back each layer sees, None in a layer that sees them
            all; None instead of the tuple where every layer does.
        compute_dtype: dtype of activations and of matrix products; masters stay as they
            are.
        remat: what the backward pass recomputes in each block: "none", "dots" (all but
            the results of the weight matrices), "mlp" (all but what enters the MLP's
            activation, half of a block's FLOPs for two arrays of its width) or "full".
        attention: what runs over whole sequences: "xla", right on every platform;
            "cudnn" on NVIDIA GPUs; "splash", a Pallas kernel, on TPUs, and slowly on
            CPUs; or "auto", the kernel of the platform where it can do what the other
            settings ask, else "xla". With "splash" and windows, real tokens must follow
            one another. Decoding with a cache is always XLA's.
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
                "DecoderConfig needs one window a layer, got "
                f"{len(self.windows)} windows and layers={self.layers}."
            )

    @property
    def max_length(self) -> int:
        """Longest sequence in tokens, stretched positions included."""
        if self.rope is None:
            return self.positions
        if self.rope.kind == "yarn":
            first = self.rope.original_positions or self.positions
            return max(self.positions, int(first * self.rope.factor))
        stretch = self.rope.factor if self.rope.kind in ("linear", "dynamic") else 1.0
        return int(self.positions * max(stretch, 1.0))
