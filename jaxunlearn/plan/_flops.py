# SPDX-License-Identifier: Apache-2.0
"""FLOPs of a step: by the usual formula, and counted in the traced program."""

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
    """FLOPs that a step needs by the usual formula, without recomputation.

    A token costs 2 N in the forward pass, 2 N for the gradient of its activations and
    2 T for the gradient of the kernels, where N is the number of entries of all kernels
    and T of those that train. N includes the unembedding (the embedding if it is tied)
    and excludes embedding lookups, norms and biases. Of a mixture's experts the share
    counts that computes a token. Attention costs
    2 * 2 * heads * head_dim per pair of token and visible key in the forward pass, and
    twice that in the backward pass; visible keys are those at or before the token and
    in its window. A term with a reference also costs the reference's forward pass.
    Norms, softmax and the optimizer are not counted.

    Args:
        model: its config has the numbers of heads and layers; without a config
            attention is not counted.
        train: params that train, or their shapes, None elsewhere.
        rest: the other params, or None.
        terms: the terms of the step.
        streams: batches or their shapes, with `tokens` [B, L].
    Returns:
        FLOPs of one step over all devices.
    """
    all_kernels = _num_entries(trees.merge(train, rest), model)
    trained = _num_entries(train, model)
    total = 0.0
    for term in terms.values():
        for stream in term.reads:
            rows, length = streams[stream]["tokens"].shape
            scores = _attention(model.config, length)
            passes = 3 if not term.needs_ref else 4
            total += rows * length * ((passes - 1) * 2.0 * all_kernels + 2.0 * trained)
            total += rows * passes * scores
    return total


def dot_flops(jaxpr: core.ClosedJaxpr | core.Jaxpr) -> float:
    """FLOPs of all matrix products in a traced program, including recomputation.

    Code on which no output depends is not counted. The body of a loop is multiplied by
    its known length, a conditional counts as its largest branch, and the body of a
    shard_map counts on every device. A Pallas kernel counts at every point of its grid,
    or at M of N points under jax.named_scope("runs_M_N"), because it skips masked
    tiles. A grouped product counts all its rows, or M of N of them in such a scope, for
    the rows of other devices' experts. Products inside cuDNN's attention are not
    counted.
    """
    if isinstance(jaxpr, core.ClosedJaxpr):
        jaxpr = jaxpr.jaxpr
    used = [True] * len(jaxpr.outvars)
    return _products(partial_eval.dce_jaxpr(jaxpr, used)[0], 1.0)


def _products(jaxpr, fraction: float) -> float:
    """FLOPs of a jaxpr whose Pallas kernels run at a fraction of their grid."""
    total = 0.0
    for equation in jaxpr.eqns:
        name, given = equation.primitive.name, equation.params
        if name == "dot_general":
            (contracted, _), _ = given["dimension_numbers"]
            shape = equation.invars[0].aval.shape
            inner = math.prod(shape[axis] for axis in contracted)
            total += 2.0 * inner * math.prod(equation.outvars[0].aval.shape)
            continue
        scope = _RUNS.search(str(equation.source_info.name_stack))
        part = int(scope[1]) / int(scope[2]) if scope else fraction
        if name == "ragged_dot_general":
            total += part * _grouped(equation)
            continue
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


def _grouped(equation) -> float:
    """FLOPs of a ragged_dot_general over all rows: 2 * entries of lhs * outputs."""
    dimensions = equation.params["ragged_dot_dimension_numbers"]
    (_, contracted), (_, batch) = dimensions.dot_dimension_numbers
    inner = {*contracted, *batch, *dimensions.rhs_group_dimensions}
    lhs, rhs, *_ = (x.aval.shape for x in equation.invars)
    outputs = math.prod(n for axis, n in enumerate(rhs) if axis not in inner)
    return 2.0 * math.prod(lhs) * outputs


def _num_entries(tree: Params, model: Model) -> float:
    tied = getattr(model.config, "tied", False)
    experts = getattr(model.config, "experts", None)
    share = experts.per_token / experts.num if experts else 1.0
    return sum(
        math.prod(leaf.shape) * (share if "/experts/" in path else 1)
        for path, leaf in trees.paths(tree).items()
        if path.endswith("kernel") or (tied and path.endswith("embedding"))
    )


def _attention(config, length: int) -> float:
    """Forward FLOPs of the attention products of one sequence, all layers."""
    if config is None:
        return 0.0
    windows = config.windows or (None,) * config.layers
    pairs = 0.0  # of query and visible key
    for window in windows:
        w = min(window or length, length)
        pairs += w * (w + 1) / 2 + (length - w) * w
    return 4.0 * config.heads * config.head_dim * pairs


def total_bytes(tree) -> float:
    """Bytes of the shards of one device; leaves carry shardings."""
    return float(sum(_shard(leaf) for leaf in jax.tree.leaves(tree)))


def _shard(leaf) -> int:
    shape = leaf.sharding.shard_shape(leaf.shape)
    return math.prod(shape) * leaf.dtype.itemsize
