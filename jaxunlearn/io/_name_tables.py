# SPDX-License-Identifier: Apache-2.0
"""Tables of names: our leaves, Hugging Face tensors and GGUF tensors.

Every row names a tensor in each of the three and says whether its two axes are swapped:
torch stores a linear weight as [out, in], we store a kernel as [in, out]. A tensor may
contain several of our leaves, concatenated along its out axis.
"""

from typing import NamedTuple

KEEP, TRANSPOSE = False, True


class Row(NamedTuple):
    """One kind of tensor; `{}` in a name is the index of the layer, and a second `{}`
    that of the expert.

    Attributes:
        paths: our leaves, in their order on the tensor's out axis.
        hf, gguf: the tensor's name in each format.
        transpose: whether the two axes are swapped in the file.
        by_head: whether the leaves alternate on the out axis, head by head.
    """

    paths: tuple[str, ...]
    hf: str
    gguf: str
    transpose: bool
    by_head: bool = False


def _linear(
    paths: str,
    hf: str,
    gguf: str = "",
    *,
    layers: str = "model.layers.{}.",
    turn: bool = TRANSPOSE,
    by_head: bool = False,
) -> list[Row]:
    hf, gguf = f"{layers}{hf}", f"blk.{{}}.{gguf}"
    return [
        Row(
            tuple(f"blocks/{path}/{leaf}" for path in paths.split()),
            f"{hf}.{theirs}",
            f"{gguf}.{theirs}",
            swap,
            by_head,
        )
        for leaf, theirs, swap in (("kernel", "weight", turn), ("bias", "bias", KEEP))
    ]


def _norm(
    path: str, hf: str, gguf: str = "", *, layers: str = "model.layers.{}."
) -> list[Row]:
    hf, gguf = f"{layers}{hf}", f"blk.{{}}.{gguf}"
    return [
        Row((f"blocks/{path}/{leaf}",), f"{hf}.{theirs}", f"{gguf}.{theirs}", KEEP)
        for leaf, theirs in (("scale", "weight"), ("bias", "bias"))
    ]


_ENDS = (
    Row(("embed/embedding",), "model.embed_tokens.weight", "token_embd.weight", KEEP),
    Row(("final_norm/scale",), "model.norm.weight", "output_norm.weight", KEEP),
    Row(("unembed/kernel",), "lm_head.weight", "output.weight", TRANSPOSE),
)
_NORMS = (
    *_norm("attention/norm", "input_layernorm", "attn_norm"),
    *_norm("mlp/norm", "post_attention_layernorm", "ffn_norm"),
)
_OUT = (
    *_linear("attention/o", "self_attn.o_proj", "attn_output"),
    *_linear("mlp/down", "mlp.down_proj", "ffn_down"),
)
_QKV = (
    *_linear("attention/q", "self_attn.q_proj", "attn_q"),
    *_linear("attention/k", "self_attn.k_proj", "attn_k"),
    *_linear("attention/v", "self_attn.v_proj", "attn_v"),
)

LLAMA = (
    *_ENDS,
    *_NORMS,
    *_OUT,
    *_QKV,
    *_norm("attention/q_norm", "self_attn.q_norm", "attn_q_norm"),
    *_norm("attention/k_norm", "self_attn.k_norm", "attn_k_norm"),
    *_linear("mlp/gate", "mlp.gate_proj", "ffn_gate"),
    *_linear("mlp/up", "mlp.up_proj", "ffn_up"),
)
PHI3 = (
    *_ENDS,
    *_NORMS,
    *_OUT,
    *_linear("attention/q attention/k attention/v", "self_attn.qkv_proj"),
    *_linear("mlp/gate mlp/up", "mlp.gate_up_proj"),
)
GEMMA2 = (
    *_ENDS,
    *(row for row in LLAMA if "/norm/" not in row.paths[0] and row not in _ENDS),
    *_norm("attention/norm", "input_layernorm", "attn_norm"),
    *_norm("attention/post_norm", "post_attention_layernorm", "post_attention_norm"),
    *_norm("mlp/norm", "pre_feedforward_layernorm", "ffn_norm"),
    *_norm("mlp/post_norm", "post_feedforward_layernorm", "post_ffw_norm"),
)


GLM4 = (
    *_ENDS,
    *_OUT,
    *_QKV,
    *_linear("mlp/gate mlp/up", "mlp.gate_up_proj", "ffn_up"),
    *_norm("attention/norm", "input_layernorm"),
    *_norm("attention/post_norm", "post_self_attn_layernorm"),
    *_norm("mlp/norm", "post_attention_layernorm"),
    *_norm("mlp/post_norm", "post_mlp_layernorm"),
)


_ATTENTION = tuple(
    row for row in LLAMA if "/attention/" in row.paths[0] or row in (*_ENDS, *_NORMS)
)


def _experts(router: str, experts: str, gate: str, up: str, down: str):
    """Rows for a mixture whose file has a tensor for each expert."""
    layers = "model.layers.{}."
    names = {"gate": gate, "up": up, "down": down}
    rows = [(f"experts/{name}", f"{experts}.{{}}.{names[name]}") for name in names]
    shared = [(f"shared/{name}", f"mlp.shared_expert.{names[name]}") for name in names]
    rows += [("router", router), *shared, ("shared_gate", "mlp.shared_expert_gate")]
    return tuple(
        Row((f"blocks/mlp/{ours}/kernel",), f"{layers}{hf}.weight", "", TRANSPOSE)
        for ours, hf in rows
    )


_QWEN_NAMES = ("mlp.gate", "mlp.experts", "gate_proj", "up_proj", "down_proj")
QWEN_MOE = (*_ATTENTION, *_experts(*_QWEN_NAMES))
_BLOCK = "block_sparse_moe"
MIXTRAL = (
    *_ATTENTION,
    *_experts(f"{_BLOCK}.gate", f"{_BLOCK}.experts", "w1", "w3", "w2"),
)
# transformers 5 may write one tensor for the kernels of all experts of a layer.
_GATE_UP = ("blocks/mlp/experts/gate/kernel", "blocks/mlp/experts/up/kernel")
FUSED = (
    Row(_GATE_UP, "model.layers.{}.mlp.experts.gate_up_proj", "", TRANSPOSE),
    Row(
        ("blocks/mlp/experts/down/kernel",),
        "model.layers.{}.mlp.experts.down_proj",
        "",
        TRANSPOSE,
    ),
    *(row for row in QWEN_MOE if "/experts/" not in row.paths[0]),
)


def _layer(paths: tuple[str, ...], hf: str) -> Row:
    return Row(paths, f"model.layers.{{}}.{_BLOCK}.{hf}.weight", "", TRANSPOSE)


GRANITE_MOE = (
    *_ATTENTION,
    _layer(_GATE_UP, "input_linear"),
    _layer(("blocks/mlp/experts/down/kernel",), "output_linear"),
    _layer(("blocks/mlp/router/kernel",), "router.layer"),
)


def _gpt2() -> tuple[Row, ...]:
    top, layers = "transformer", "transformer.h.{}."
    qkv = "attention/q attention/k attention/v"
    return (
        Row(("embed/embedding",), f"{top}.wte.weight", "", KEEP),
        Row(("positions/embedding",), f"{top}.wpe.weight", "", KEEP),
        *_final(f"{top}.ln_f"),
        Row(("unembed/kernel",), "lm_head.weight", "", TRANSPOSE),
        *_norm("attention/norm", "ln_1", layers=layers),
        *_norm("mlp/norm", "ln_2", layers=layers),
        *_linear(qkv, "attn.c_attn", layers=layers, turn=KEEP),
        *_linear("attention/o", "attn.c_proj", layers=layers, turn=KEEP),
        *_linear("mlp/up", "mlp.c_fc", layers=layers, turn=KEEP),
        *_linear("mlp/down", "mlp.c_proj", layers=layers, turn=KEEP),
    )


def _opt() -> tuple[Row, ...]:
    top, layers = "model.decoder", "model.decoder.layers.{}."
    return (
        Row(("embed/embedding",), f"{top}.embed_tokens.weight", "", KEEP),
        Row(("positions/embedding",), f"{top}.embed_positions.weight", "", KEEP),
        *_final(f"{top}.final_layer_norm"),
        Row(("unembed/kernel",), "lm_head.weight", "", TRANSPOSE),
        *_norm("attention/norm", "self_attn_layer_norm", layers=layers),
        *_norm("mlp/norm", "final_layer_norm", layers=layers),
        *_linear("attention/q", "self_attn.q_proj", layers=layers),
        *_linear("attention/k", "self_attn.k_proj", layers=layers),
        *_linear("attention/v", "self_attn.v_proj", layers=layers),
        *_linear("attention/o", "self_attn.out_proj", layers=layers),
        *_linear("mlp/up", "fc1", layers=layers),
        *_linear("mlp/down", "fc2", layers=layers),
    )


def _neox() -> tuple[Row, ...]:
    top, layers = "gpt_neox", "gpt_neox.layers.{}."
    qkv = "attention/q attention/k attention/v"
    return (
        Row(("embed/embedding",), f"{top}.embed_in.weight", "", KEEP),
        *_final(f"{top}.final_layer_norm"),
        Row(("unembed/kernel",), "embed_out.weight", "", TRANSPOSE),
        *_norm("attention/norm", "input_layernorm", layers=layers),
        *_norm("mlp/norm", "post_attention_layernorm", layers=layers),
        *_linear(qkv, "attention.query_key_value", layers=layers, by_head=True),
        *_linear("attention/o", "attention.dense", layers=layers),
        *_linear("mlp/up", "mlp.dense_h_to_4h", layers=layers),
        *_linear("mlp/down", "mlp.dense_4h_to_h", layers=layers),
    )


def _phi() -> tuple[Row, ...]:
    return (
        Row(
            ("embed/embedding",), "model.embed_tokens.weight", "token_embd.weight", KEEP
        ),
        *_final("model.final_layernorm", "output_norm"),
        Row(("unembed/kernel",), "lm_head.weight", "output.weight", TRANSPOSE),
        Row(("unembed/bias",), "lm_head.bias", "output.bias", KEEP),
        *_norm("attention/norm", "input_layernorm", "attn_norm"),
        *_QKV,
        *_norm("attention/q_norm", "self_attn.q_layernorm", "attn_q_norm"),
        *_norm("attention/k_norm", "self_attn.k_layernorm", "attn_k_norm"),
        *_linear("attention/o", "self_attn.dense", "attn_output"),
        *_linear("mlp/up", "mlp.fc1", "ffn_up"),
        *_linear("mlp/down", "mlp.fc2", "ffn_down"),
    )


def _final(hf: str, gguf: str = "") -> list[Row]:
    return [
        Row(("final_norm/scale",), f"{hf}.weight", gguf and f"{gguf}.weight", KEEP),
        Row(("final_norm/bias",), f"{hf}.bias", gguf and f"{gguf}.bias", KEEP),
    ]


TABLES = {
    **dict.fromkeys(("llama", "mistral", "qwen2", "qwen3", "gemma"), LLAMA),
    **dict.fromkeys(("olmo", "smollm3", "ministral", "granite", "seed_oss"), LLAMA),
    **dict.fromkeys(("gemma2", "gemma3_text", "olmo2", "olmo3"), GEMMA2),
    **dict.fromkeys(("glm", "glm4"), GLM4),
    "phi": _phi(),
    **dict.fromkeys(("qwen2_moe", "qwen3_moe", "olmoe"), QWEN_MOE),
    "mixtral": MIXTRAL,
    "granitemoe": GRANITE_MOE,
    "phi3": PHI3,
    "gpt2": _gpt2(),
    "opt": _opt(),
    "gpt_neox": _neox(),
}
