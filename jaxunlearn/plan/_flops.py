# SPDX-License-Identifier: Apache-2.0
"""FLOPs of a step, twice: by the usual formula, and from the program that is run."""

import math
import re
from collections.abc import Mapping

import jax
from jax.extend import core
from jax.interpreters import partial_eval

from jaxunlearn import trees
from jaxunlearn.typing import Model, Params, Streams, Term

_RUNS = re.compile(r"\bruns_(\d+)_(\d+)\b")


def model_flops(
    model: Model,
    train: Params,
    rest: Params | None,
    terms: Mapping[str, Term],
    streams: Streams,
) -> float:
    """FLOPs that the step needs by the usual formula, without what is computed again.

    A token costs 2 N forward, 2 N for the gradient of its activations and 2 T for that
    of the kernels, N being all kernels and T those that train. N counts the unembedding
    (the embedding where it is tied) and leaves out looked-up embeddings, norms and
    biases. Attention costs 2 * 2 * heads * head_dim a token and key it may see in the
    forward pass and twice that backward; only keys at or before the token, and in its
    window, count.
    A term with a reference pays its forward pass too. Norms, softmax and the optimizer
    are left out.

    Args:
        model: its config tells heads and layers; without one attention is left out.
        train: params that train, or their shapes, None elsewhere.
        rest: the others, or None.
        terms: the terms of the step.
        streams: batches or their shapes, `tokens` [B, L] in each.
    Returns:
        FLOPs of one step over all devices.
    """
    every = _kernels(trees.merge(train, rest), model)
    own = _kernels(train, model)
    total = 0.0
    for term in terms.values():
        for stream in term.reads:
            rows, length = streams[stream]["tokens"].shape
            scores = _attention(model.config, length)
            passes = 3 if not term.needs_ref else 4
            total += rows * length * ((passes - 1) * 2.0 * every + 2.0 * own)
            total += rows * passes * scores
    return total


def dot_flops(jaxpr: core.ClosedJaxpr | core.Jaxpr) -> float:
    """FLOPs of all matrix products in a traced program, recomputation included.

    What no output depends on is dropped first. Loops of known length multiply what is
    in them; a conditional counts its largest branch; what is in a shard_map counts on
    every device. A Pallas kernel counts at every point of its grid; where it stands in
    jax.named_scope("runs_M_N"), at M of N, as it skips tiles that are masked.
    Products inside cuDNN's attention are not seen.
    """
    if isinstance(jaxpr, core.ClosedJaxpr):
        jaxpr = jaxpr.jaxpr
    used = [True] * len(jaxpr.outvars)
    return _products(partial_eval.dce_jaxpr(jaxpr, used)[0], 1.0)


def _products(jaxpr, share: float) -> float:
    """Matrix products of a jaxpr, whose kernels run at this share of their grid."""
    total = 0.0
    for equation in jaxpr.eqns:
        name, given = equation.primitive.name, equation.params
        if name == "dot_general":
            (contracted, _), _ = given["dimension_numbers"]
            shape = equation.invars[0].aval.shape
            inner = math.prod(shape[axis] for axis in contracted)
            total += 2.0 * inner * math.prod(equation.outvars[0].aval.shape)
            continue
        said = _RUNS.search(str(equation.source_info.name_stack))
        part = int(said[1]) / int(said[2]) if said else share
        inside = [
            _products(getattr(inner, "jaxpr", inner), part)
            for inner in core.jaxprs_in_params(given)
        ]
        if name == "cond":
            total += max(inside)
            continue
        times = given.get("length", 1)
        if name == "pallas_call":
            times = part * math.prod(given["grid_mapping"].grid)
        elif name == "shard_map":
            times = math.prod(
                given["mesh"].shape[a] for a in given["newly_manual_axes"]
            )
        total += times * sum(inside)
    return total


def _kernels(tree: Params, model: Model) -> int:
    tied = getattr(model.config, "tied", False)
    return sum(
        math.prod(leaf.shape)
        for path, leaf in trees.paths(tree).items()
        if path.endswith("kernel") or (tied and path.endswith("embedding"))
    )


def _attention(config, length: int) -> float:
    """Forward FLOPs of the attention products of one sequence, all layers."""
    if config is None:
        return 0.0
    windows = config.windows or (None,) * config.layers
    seen = 0.0
    for window in windows:
        w = min(window or length, length)
        seen += w * (w + 1) / 2 + (length - w) * w
    return 4.0 * config.heads * config.head_dim * seen


def total_bytes(tree) -> float:
    """Bytes of the shards of one device; leaves carry shardings."""
    return float(sum(_shard(leaf) for leaf in jax.tree.leaves(tree)))


def _shard(leaf) -> int:
    shape = leaf.sharding.shard_shape(leaf.shape)
    return math.prod(shape) * leaf.dtype.itemsize
