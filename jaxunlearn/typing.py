# SPDX-License-Identifier: Apache-2.0
"""The types that all parts of jaxunlearn share.

Letters in shapes: B batch, L tokens, V vocabulary, D width, F hidden units, H heads,
N layers.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import jax

Array = jax.Array
PyTree = Any
PRNGKey = jax.Array

Params = PyTree
"""Nested dict of arrays, with None for a leaf that is in the other half of a split."""

Batch = Mapping[str, Array]
"""Columns of one stream. Language: `tokens` [B, L] int32, `mask` [B, L] bool (True: a
real token), and optionally `answer` [B, L] bool (True: the loss reads this token as a
target; every real token if absent) and `ref_logps` [B] float32 (nats, summed over the
answer). Images: `image` [B, H, W, C], and a row of two tokens of which the second is
the label; see `models.vision`."""

Streams = Mapping[str, Batch]
"""One batch for each named stream, such as {"forget": ..., "retain": ...}."""


Axes = Sequence[str | Sequence[str] | None]
Rules = Sequence[tuple[str, Axes]]
"""Ordered (pattern of leaf paths, mesh axes by dimension); see `sharding.by_rules`."""


class Routing(NamedTuple):
    """How a router distributes the real tokens of each row over experts.

    Attributes:
        tokens: [N, B, E] float32, number of tokens that the expert computes.
        probs: [N, B, E] float32, sum over the tokens of the expert's probability.
    """

    tokens: Array
    probs: Array


class Outputs(NamedTuple):
    """What a model's forward pass returns.

    Attributes:
        hidden: [B, L, D], final normed hidden states (the raw block output if `until`
            was given).
        taps: site name -> [requested layers, B, L, units], for the requested sites.
        routing: of each layer that ran, for a mixture of experts; None for others.
    """

    hidden: Array
    taps: Mapping[str, Array]
    routing: Routing | None = None


class Site(NamedTuple):
    """A named place in a model where activations can be read or replaced.

    Attributes:
        units: number of units, the last axis of the site's value.
        layers: number of layers that have the site.
        reader: leaf path of the one kernel that reads the site; None if several do.
        axis: axis of one layer's `reader` that indexes the units.
        readers: leaf paths of all kernels whose input is the site's value.
        writers: leaf paths of kernels whose outputs lead to the site's value unit by
            unit, so that without an output its unit is 0 or unused.
        grouping: (heads, size), where several heads read one output of a writer: each
            run of `size` outputs becomes `heads` consecutive runs of the site's units.
    """

    units: int
    layers: int
    reader: str | None = None
    axis: int = 0
    readers: tuple[str, ...] = ()
    writers: tuple[str, ...] = ()
    grouping: tuple[int, int] = (1, 1)


class Model(NamedTuple):
    """A network as pure functions; its parameters are always an argument.

    Attributes:
        init: key -> params.
        apply: (params, batch, *, taps={}, edits={}, until=None, key=None) -> Outputs.
            `taps` maps a site to the layers whose values are returned, `edits` maps a
            site to a function (value [B, L, units], layer int32[]) -> value, `until`
            stops after a layer.
        unembed: (params, hidden [..., D]) -> logits [..., V] float32.
        sites: the sites that `taps` and `edits` may name.
        config: the configuration that built the model, for exporters; None without one.
        init_cache: (batch_size, length, *, min_length=0) -> empty key-value cache; None
            if the model cannot decode. `min_length` is only given if the config has a
            `cache_limit` (DecoderConfig). Rows are axis 0 of its arrays, or axis 1 of
            arrays with five axes, which have all layers; a scalar counts the tokens of
            a row so far.
        decode: (params, batch, cache) -> (hidden, cache), appends the batch's tokens.
        prepare_decode: params -> params in the layout that a loop of `decode` reads
            fastest; None if that is their usual layout.
        rules: how the params are placed on a mesh, for `sharding.by_rules`.
        low_rank: whether `apply` adds x @ lora_a @ lora_b to the product of a kernel
            that has the leaves `lora_a` and `lora_b` (`wrap.lora`).
        packs: `apply` again, if it takes the columns `positions` and `ends`, with which
            a row holds several sequences and shared beginnings once (the decoder's
            `apply`). A copy of the model with another `apply` is run without them.
        target_logps: (params, hidden [B, L, D], targets [B, L]) -> their
            log-probabilities [B, L] float32, without an array of logits; None to
            compute them from `unembed`.
    """

    init: Callable[[PRNGKey], Params]
    apply: Callable[..., Outputs]
    unembed: Callable[[Params, Array], Array]
    sites: Mapping[str, Site]
    config: Any = None
    init_cache: Callable[..., PyTree] | None = None
    decode: Callable[..., tuple[Array, PyTree]] | None = None
    prepare_decode: Callable[[Params], Params] | None = None
    rules: Rules = ((".*", ()),)
    low_rank: bool = False
    packs: Callable[..., Outputs] | None = None
    target_logps: Callable[[Params, Array, Array], Array] | None = None

    def __hash__(self) -> int:
        """Hash of the functions, so that a model can be a static argument of jit."""
        return hash((self.apply, self.unembed))


class Total(NamedTuple):
    """A sum and the number of summands; the division happens once, at the end."""

    sum: Array
    count: Array

    def mean(self) -> Array:
        """sum / count, and 0 where the count is 0."""
        count = self.count.astype(self.sum.dtype)
        return jax.numpy.where(count > 0, self.sum / jax.numpy.maximum(count, 1), 0)


Metrics = Mapping[str, Total]


class Term(Protocol):
    """A loss bound to a model and to the streams it reads. Pure.

    Attributes:
        reads: names of the streams the term reads.
        needs_ref: whether it runs the reference model and so needs `ref_params`.
    """

    reads: tuple[str, ...]
    needs_ref: bool

    def __call__(
        self,
        params: Params,
        streams: Streams,
        ref_params: Params | None,
        key: PRNGKey,
    ) -> tuple[Total, Metrics]: ...


class Frozen(NamedTuple):
    """The arrays that a step reads and never changes; an argument that is not donated.

    Attributes:
        params: the leaves that do not train, None in the places of those that do.
        ref_params: the reference model's parameters, or None if no term needs them.
    """

    params: Params = None
    ref_params: Params | None = None
