# SPDX-License-Identifier: Apache-2.0
"""Tables of names: our leaves, Hugging Face tensors and GGUF tensors.

Every row names a tensor in each of the three and says whether its two axes are swapped:
torch stores a linear weight as [out, in], we store a kernel as [in, out]. A tensor may
contain several of our leaves, concatenated along its out axis. Loading and saving use
the same table.
"""

import itertools
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

from jaxunlearn import _checks, trees
from jaxunlearn.models import _config, decoder

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
    "phi3": PHI3,
    "gpt2": _gpt2(),
    "opt": _opt(),
    "gpt_neox": _neox(),
}
# Prefixes that are missing in the names of a model saved without its head.
_PREFIXES = ("transformer.", "model.", "gpt_neox.")

# Buffers that older exporters saved with the weights; the decoder computes them.
_BUFFERS = re.compile(
    r".*\.rotary_emb\.(inv_freq|cos_cached|sin_cached)|.*\.masked_bias|"
    r"(.*\.)?h\.\d+\.attn\.bias|.*\.attention\.bias|"
    r"rope_freqs\.weight|rope_factors_(long|short)\.weight"
)


# Tensors of the other parts of a multimodal model, and the prefixes of its text model
# as transformers 4 and 5 write them.
_NOT_TEXT = re.compile(
    r"(model\.)?(vision_tower|vision_model|multi_modal_projector)\..*"
)
_TEXT = re.compile(r"(?:model\.)?language_model\.(?:model\.)?(.*)")


def text_part(entries: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """The tensors of the text model in a multimodal folder, under the names that a text
    model has, and the names of the others."""
    found, others = {}, []
    for name, entry in entries.items():
        inner = _TEXT.fullmatch(name)
        if _NOT_TEXT.fullmatch(name):
            others.append(name)
        elif inner and inner[1].startswith("lm_head."):
            found[inner[1]] = entry
        else:
            found[f"model.{inner[1]}" if inner else name] = entry
    return found, others


class Part(NamedTuple):
    """The part of a tensor that belongs to one leaf.

    The tensor's out axis has `groups` equal groups; the leaf has units `start` to
    `start + size` of each group, in order.

    Attributes:
        path: our leaf.
        layer: index on the leaf's first axis; None if the tensor holds all layers or
            the leaf has none.
        expert: index on the leaf's second axis; None if the tensor holds all experts or
            the leaf has none.
        groups: number of groups.
        start, size: first unit within a group, and number of units.
    """

    path: str
    layer: int | None
    groups: int
    start: int
    size: int
    expert: int | None = None

    @property
    def place(self) -> tuple[int, ...]:
        """The indices on the leaf's first axes."""
        return tuple(i for i in (self.layer, self.expert) if i is not None)


class Tensor(NamedTuple):
    """One tensor in a file: its shape in the file, and the leaves it contains."""

    shape: tuple[int, ...]
    transpose: bool
    parts: tuple[Part, ...]


def tensors(config: _config.DecoderConfig, kind: str = "hf") -> dict[str, Tensor]:
    """The tensors of a checkpoint of this model, by name, in the order of our leaves.

    Args:
        config: the model.
        kind: whose names, "hf", "hf_fused" (with one tensor for all experts of a layer)
            or "gguf".
    """
    shapes = {
        path: leaf.shape for path, leaf in trees.paths(decoder.shapes(config)).items()
    }
    found = {}
    for row in _table(config, kind):
        if row.paths[0] not in shapes:
            continue
        name = _name(row, kind)
        groups = config.kv_heads if row.by_head else 1
        sizes = [shapes[path][-1] // groups for path in row.paths]
        starts = [sum(sizes[:i]) for i in range(len(sizes))]
        first, stacked = shapes[row.paths[0]], name.count("{}")
        shape = (*first[stacked:-1], groups * sum(sizes))
        if row.transpose:
            shape = (*shape[:-2], shape[-1], shape[-2])
        for place in itertools.product(*(range(size) for size in first[:stacked])):
            layer, expert = (*place, None, None)[:2]
            parts = tuple(
                Part(path, layer, groups, start, size, expert)
                for path, start, size in zip(row.paths, starts, sizes, strict=True)
            )
            found[name.format(*place)] = Tensor(shape, row.transpose, parts)
    return found


def kind_of(config: _config.DecoderConfig, names: Iterable[str]) -> str:
    """The kind, "hf" or "hf_fused", of a folder with tensors of these names."""
    fused = config.experts is not None and _name(FUSED[0], "hf").format(0) in names
    return "hf_fused" if fused else "hf"


def _table(config: _config.DecoderConfig, kind: str) -> tuple[Row, ...]:
    return FUSED if kind == "hf_fused" else TABLES[config.family]


def _name(row: Row, kind: str) -> str:
    return row.gguf if kind == "gguf" else row.hf


def name_of(config: _config.DecoderConfig, kind: str, path: str) -> str:
    """The name of the tensor that contains the leaf `path`, which has no layers."""
    row = next(row for row in _table(config, kind) if path in row.paths)
    return _name(row, kind)


def renamed(
    config: _config.DecoderConfig, entries: Mapping[str, Any]
) -> dict[str, Any]:
    """The entries of a folder under the names of `tensors`.

    Two other spellings are recognised: a model saved without its head, such as the
    original GPT-2, has names without their first part, and transformers 5 may call
    embed_out of GPT-NeoX lm_head.
    """
    kind = kind_of(config, entries)
    wanted = tensors(config, kind)
    head = name_of(config, kind, "unembed/kernel")
    found = {}
    for name, entry in entries.items():
        others = [prefix + name for prefix in _PREFIXES]
        others += [head] if name == "lm_head.weight" else []
        matches = [other for other in others if other in wanted]
        unchanged = name in wanted or not matches or matches[0] in entries
        found[name if unchanged else matches[0]] = entry
    return found


def cuts(
    tensor: Tensor, part: Part, index: tuple[slice, ...]
) -> Iterator[tuple[Any, tuple[slice, ...]]]:
    """Where the values of a piece of a leaf are in a tensor, one group at a time.

    Args:
        tensor, part: from `tensors`.
        index: the piece: a slice with start and stop for each axis of the leaf, without
            the axis of layers.
    Yields:
        (index into the piece, index into the tensor) of the same values. If the tensor
        is transposed, the two axes are swapped.
    """
    *inner, units = index
    group_units = tensor.shape[-2 if tensor.transpose else -1] // part.groups
    for group in range(part.groups):
        first = group * part.size
        start, stop = max(units.start, first), min(units.stop, first + part.size)
        if start < stop:
            shift = group * group_units + part.start - first
            there = (*inner, slice(start + shift, stop + shift))
            here = (..., slice(start - units.start, stop - units.start))
            if tensor.transpose:
                there = (*there[:-2], there[-1], there[-2])
            yield here, there


def check(
    owner: str,
    where: object,
    needed: Mapping[str, tuple[int, ...]],
    came: Mapping[str, tuple[int, ...]],
    fix: str,
) -> None:
    """Compares names and shapes and reports all differences together.

    Raises:
        ValueError: listing what is missing, unexpected or of another shape.
    """
    missing = [name for name in needed if name not in came]
    unexpected = [name for name in came if name not in needed]
    misshaped = [
        f"{name} should be {tuple(needed[name])} and is {tuple(came[name])}"
        for name in needed
        if name in came and tuple(needed[name]) != tuple(came[name])
    ]
    wrong = [
        f"{len(names)} {what}: {_checks.listed(names)}"
        for what, names in (
            ("missing", missing),
            ("unexpected", unexpected),
            ("of another shape", misshaped),
        )
        if names
    ]
    if wrong:
        raise ValueError(
            f"{owner} needs exactly the {len(needed)} tensors its settings describe, "
            f"got {len(came)} in {where}: {'; '.join(wrong)}. {fix}"
        )


def buffers(names: Iterable[str]) -> set[str]:
    """The names of buffers, which may be ignored."""
    return {name for name in names if _BUFFERS.fullmatch(name)}
