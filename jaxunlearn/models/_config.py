# SPDX-License-Identifier: Apache-2.0
"""Settings of the decoder: everything that distinguishes one model family from
another."""

import dataclasses

from jaxunlearn import _checks
from jaxunlearn.models import _matmul

ROPE_KINDS = ("default", "linear", "dynamic", "yarn", "longrope", "llama3")
NORMS = ("rms", "rms_plus_one", "layer", "layer_unscaled")
QK_NORMS = ("head", "all")
ACTIVATIONS = ("silu", "gelu", "gelu_tanh", "relu")
REMAT = ("none", "dots", "offload", "mlp", "full")
DTYPES = ("float32", "bfloat16", "float16")
ATTENTION = ("xla", "cudnn", "splash", "tokamax", "auto")
UNEMBED = ("xla", "tokamax")


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
        interleaved: whether a plane is two neighbouring units (GLM); otherwise it is
            unit i and unit i + half.

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
    interleaved: bool = False

    @property
    def by_length(self) -> bool:
        """Whether the frequencies depend on the length of the sequence."""
        return self.kind in ("dynamic", "longrope")

    def __post_init__(self):
        _checks.one_of("RopeConfig", ROPE_KINDS, kind=self.kind)
        _checks.positive(
            "RopeConfig", theta=self.theta, factor=self.factor, partial=self.partial
        )


@dataclasses.dataclass(frozen=True)
class ExpertsConfig:
    """A mixture of experts in place of each MLP.

    The router gives every token a probability for each expert, a float32 softmax of a
    linear function of the MLP's input. The token's output is the sum, over the
    `per_token` experts with the largest probabilities, of probability times output.

    Attributes:
        num: number of experts, E.
        per_token: number of experts that compute each token.
        normalize: whether the chosen probabilities are divided by their sum.
        shared_hidden: hidden units of an MLP that computes every token; 0 for none. Its
            output is multiplied by the sigmoid of a linear function of the input.
    """

    num: int
    per_token: int
    normalize: bool = True
    shared_hidden: int = 0

    def __post_init__(self):
        _checks.positive_int("ExpertsConfig", num=self.num, per_token=self.per_token)
        _checks.not_negative("ExpertsConfig", shared_hidden=self.shared_hidden)
        if self.per_token > self.num:
            raise ValueError(
                "ExpertsConfig needs per_token of at most num, got "
                f"per_token={self.per_token} and num={self.num}."
            )


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
    """A decoder-only language model.

    Attributes:
        family: Hugging Face's `model_type`; it determines names in files, never the
            computation.
        vocab, width, layers, hidden: V, D, N and F (with experts, F of each).
        heads, kv_heads, head_dim: number of query heads, number of key-value heads
            (which divides `heads`), size of a head.
        positions: longest sequence the model is meant for, in tokens.
        norm_eps: added to the mean square (or variance) in every norm.
        rope: rotary positions; None if the model learned a table of positions.
        local_rope: rotary positions of the layers with a window, if they differ from
            those of the other layers (Gemma 3).
        position_offset: number of rows of a learned table before position 0 (OPT: 2).
        norm: "rms", "rms_plus_one" (the scale is stored minus 1, Gemma), "layer" (the
            mean is subtracted, and there is a bias) or "layer_unscaled" (the mean is
            subtracted, and there are no parameters, OLMo).
        pre_norms: whether the inputs of attention and MLP are normed (not in OLMo 2).
        post_norms: whether the outputs of attention and MLP are normed (Gemma 2 and 3,
            OLMo 2).
        activation: of the MLP's units, one of ACTIVATIONS.
        gated: whether the units are multiplied by a second projection.
        parallel: whether attention and MLP read the same input (GPT-NeoX).
        shared_norm: whether one norm serves attention and MLP, which needs `parallel`
            (Phi).
        embed_scale: factor on the embeddings, rounded to the compute dtype (Gemma).
        attention_scale: factor on q k^T; 1 / sqrt(head_dim) if None.
        residual_scale: factor on the outputs of attention and MLP (Granite).
        logit_divisor: what the logits are divided by (Granite).
        attention_softcap, logit_softcap: c in c * tanh(x / c), on attention scores and
            on logits (Gemma 2).
        tied: whether the unembedding equals the embedding.
        qkv_bias, out_bias, mlp_bias: which projections add a bias.
        unembed_bias: whether the unembedding adds a bias (Phi).
        qk_norm: whether queries and keys are normed (Qwen3).
        qk_norm_over: the units of one norm of queries or keys: "head", those of each
            head, or "all", those of all heads together (OLMo 2).
        qkv_clip: c, if queries, keys and values are clipped to [-c, c], after the norms
            of queries and keys (OLMo, OLMoE).
        rope_layers: for each layer whether it has rotary positions (SmolLM3); None
            instead of the tuple if all have.
        windows: for each layer, the number of tokens a query attends to, itself
            included, or None for all; None instead of the tuple if all layers attend to
            all tokens.
        experts: the mixture of experts in every layer; None for an MLP.
        compute_dtype: dtype of activations and matrix products; params keep theirs.
            On CPUs bfloat16 is the dtype of what is multiplied, and activations
            between products stay float32. "auto" becomes the faster of bfloat16 and
            float32 on the platform where the config is made.
        remat: what the backward pass recomputes in each block: "none", "dots"
            (everything but the products with weight matrices), "offload" (the same, but
            these products wait in pinned memory of the host), "mlp" (everything but
            the inputs of the MLP's activation: half of a block's FLOPs, for two arrays
            of width F) or "full".
        attention: implementation for complete sequences: "xla", correct on every
            platform; "cudnn" on NVIDIA GPUs; "splash", a Pallas kernel, on TPUs, and
            slowly on CPUs; "tokamax", the best kernel of that library for the platform
            (the extra tokamax, Python 3.12); or "auto", the kernel of the platform if
            it supports the other settings ("cudnn" or "splash"), else "xla". With
            "splash" and windows, real tokens must be contiguous. Decoding with a cache
            always uses "xla".
        unembed: how terms get the log-probabilities of targets: "xla", from chunks of
            logits, or "tokamax", by a fused linear cross-entropy of that library, which
            has a kernel for TPUs and takes logits without cap, divisor and bias.
        eos_ids: ids of the tokens at which generation stops, as the checkpoint names
            them.
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
    pre_norms: bool = True
    post_norms: bool = False
    activation: str = "silu"
    gated: bool = True
    parallel: bool = False
    shared_norm: bool = False
    embed_scale: float | None = None
    attention_scale: float | None = None
    residual_scale: float | None = None
    logit_divisor: float | None = None
    attention_softcap: float | None = None
    logit_softcap: float | None = None
    tied: bool = False
    qkv_bias: bool = False
    out_bias: bool = False
    mlp_bias: bool = False
    unembed_bias: bool = False
    qk_norm: bool = False
    qk_norm_over: str = "head"
    qkv_clip: float | None = None
    rope_layers: tuple[bool, ...] | None = None
    windows: tuple[int | None, ...] | None = None
    experts: ExpertsConfig | None = None
    compute_dtype: str = "float32"
    remat: str = "full"
    attention: str = "xla"
    unembed: str = "xla"
    eos_ids: tuple[int, ...] = ()
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
        dtypes = ("auto", *DTYPES)
        _checks.one_of("DecoderConfig", dtypes, compute_dtype=self.compute_dtype)
        if self.compute_dtype == "auto":
            object.__setattr__(self, "compute_dtype", _matmul.fastest_dtype())
        _checks.one_of("DecoderConfig", UNEMBED, unembed=self.unembed)
        if self.unembed == "tokamax":
            settings = ("logit_softcap", "logit_divisor", "unembed_bias")
            for name in settings:
                if getattr(self, name):
                    raise ValueError(
                        "DecoderConfig needs logits without cap, divisor and bias for "
                        f"unembed='tokamax', got {name}={getattr(self, name)}. Set "
                        "unembed='xla'."
                    )
        _checks.one_of("DecoderConfig", NORMS, norm=self.norm)
        _checks.one_of("DecoderConfig", ACTIVATIONS, activation=self.activation)
        _checks.one_of("DecoderConfig", QK_NORMS, qk_norm_over=self.qk_norm_over)
        factors = ("embed_scale", "attention_scale", "residual_scale", "logit_divisor")
        for name in (*factors, "qkv_clip", "attention_softcap", "logit_softcap"):
            if getattr(self, name) is not None:
                _checks.positive("DecoderConfig", **{name: getattr(self, name)})
        if self.shared_norm and not (self.parallel and self.pre_norms):
            raise ValueError(
                "DecoderConfig needs parallel and pre_norms for shared_norm, "
                f"got parallel={self.parallel} and pre_norms={self.pre_norms}."
            )
        if self.experts is not None and (not self.gated or self.mlp_bias):
            raise ValueError(
                "DecoderConfig needs gated=True and mlp_bias=False with experts, got "
                f"gated={self.gated} and mlp_bias={self.mlp_bias}."
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
        for name in ("windows", "rope_layers"):
            values = getattr(self, name)
            if values is not None and len(values) != self.layers:
                raise ValueError(
                    f"DecoderConfig needs one entry of {name} per layer, got "
                    f"{len(values)} entries and layers={self.layers}."
                )
        if self.rope_layers is not None and self.rope is None:
            raise ValueError(
                "DecoderConfig needs rope with rope_layers, got rope=None."
            )

    @property
    def cache_limit(self) -> int | None:
        """Longest sequence, in tokens, for which running its parts into a cache equals
        one pass over all of it; None if any length.

        With `dynamic` and `longrope` a sequence that grows past this length has other
        rotations, those of its earlier tokens included.
        """
        ropes = [r for r in (self.rope, self.local_rope) if r is not None]
        limits = [r.original_positions or self.positions for r in ropes if r.by_length]
        return min(limits, default=None)

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
