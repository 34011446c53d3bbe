# SPDX-License-Identifier: Apache-2.0
"""One table of names: our leaves, Hugging Face tensors and GGUF tensors.

Every row says where a tensor lives in each of the three and whether its two axes swap:
torch keeps a linear weight as [out, in], we keep a kernel as [in, out]. Loading and
saving read the same table, so what is saved is what was loaded.
"""

import re
from collections.abc import Iterable, Mapping
from typing import NamedTuple

from jaxunlearn import _checks, trees
from jaxunlearn.models import _config, decoder

KEEP, TRANSPOSE = False, True


class Row(NamedTuple):
    """One kind of tensor; `{}` in a name stands for the layer."""

    path: str
    hf: str
    gguf: str
    transpose: bool


def _linear(path: str, hf: str, gguf: str) -> list[Row]:
    path, hf, gguf = f"blocks/{path}", f"model.layers.{{}}.{hf}", f"blk.{{}}.{gguf}"
    return [
        Row(f"{path}/kernel", f"{hf}.weight", f"{gguf}.weight", TRANSPOSE),
        Row(f"{path}/bias", f"{hf}.bias", f"{gguf}.bias", KEEP),
    ]


def _norm(path: str, hf: str, gguf: str) -> list[Row]:
    hf, gguf = f"model.layers.{{}}.{hf}.weight", f"blk.{{}}.{gguf}.weight"
    return [Row(f"blocks/{path}/scale", hf, gguf, KEEP)]


TABLE = (
    Row("embed/embedding", "model.embed_tokens.weight", "token_embd.weight", KEEP),
    *_norm("attention/norm", "input_layernorm", "attn_norm"),
    *_linear("attention/q", "self_attn.q_proj", "attn_q"),
    *_linear("attention/k", "self_attn.k_proj", "attn_k"),
    *_linear("attention/v", "self_attn.v_proj", "attn_v"),
    *_linear("attention/o", "self_attn.o_proj", "attn_output"),
    *_norm("attention/q_norm", "self_attn.q_norm", "attn_q_norm"),
    *_norm("attention/k_norm", "self_attn.k_norm", "attn_k_norm"),
    *_norm("mlp/norm", "post_attention_layernorm", "ffn_norm"),
    *_linear("mlp/gate", "mlp.gate_proj", "ffn_gate"),
    *_linear("mlp/up", "mlp.up_proj", "ffn_up"),
    *_linear("mlp/down", "mlp.down_proj", "ffn_down"),
    Row("final_norm/scale", "model.norm.weight", "output_norm.weight", KEEP),
    Row("unembed/kernel", "lm_head.weight", "output.weight", TRANSPOSE),
)

# Buffers that older exporters wrote beside the weights; the decoder computes them.
_BUFFERS = re.compile(
    r".*\.rotary_emb\.(inv_freq|cos_cached|sin_cached)|.*\.masked_bias|"
    r"rope_freqs\.weight|rope_factors_(long|short)\.weight"
)


class Tensor(NamedTuple):
    """One tensor in a file: part of the leaf `path`, or all of it where layer is None.

    Attributes:
        path: our leaf.
        layer: index on the leaf's first axis.
        transpose: whether the file holds the two axes the other way round.
        shape: as in the file.
    """

    path: str
    layer: int | None
    transpose: bool
    shape: tuple[int, ...]


def tensors(config: _config.DecoderConfig, kind: str = "hf") -> dict[str, Tensor]:
    """The tensors a file of this model holds, by name, leaf after leaf.

    Args:
        config: the model.
        kind: whose names, "hf" or "gguf".
    """
    shapes = {
        path: leaf.shape for path, leaf in trees.paths(decoder.shapes(config)).items()
    }
    found = {}
    for row in TABLE:
        if row.path not in shapes:
            continue
        name, shape = getattr(row, kind), shapes[row.path]
        stacked = "{}" in name
        part = shape[1:] if stacked else shape
        part = part[::-1] if row.transpose else part
        for layer in range(shape[0]) if stacked else [None]:
            found[name.format(layer)] = Tensor(row.path, layer, row.transpose, part)
    return found


def check(
    owner: str,
    where: object,
    needed: Mapping[str, tuple[int, ...]],
    came: Mapping[str, tuple[int, ...]],
    fix: str,
) -> None:
    """Compares names and shapes, and reports everything that is wrong at once.

    Raises:
        ValueError: listing what is missing, what is left over and what has another
        shape.
    """
    missing = [name for name in needed if name not in came]
    surplus = [name for name in came if name not in needed]
    misshaped = [
        f"{name} should be {tuple(needed[name])} and is {tuple(came[name])}"
        for name in needed
        if name in came and tuple(needed[name]) != tuple(came[name])
    ]
    wrong = [
        f"{len(names)} {what}: {_checks.listed(names)}"
        for what, names in (
            ("missing", missing),
            ("not expected", surplus),
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
    """Those of `names` that are harmless extras and may be ignored."""
    return {name for name in names if _BUFFERS.fullmatch(name)}
