# SPDX-License-Identifier: Apache-2.0
"""The types that the rooms of jaxunlearn share; no behaviour lives here.

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
"""Nested dict of arrays. None stands where a leaf belongs to the other half of a
split."""

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


class Outputs(NamedTuple):
    """What a model's forward pass returns.

    Attributes:
        hidden: [B, L, D], final normed hidden states (the raw block output if `until`
            was given).
        taps: site name -> [layers asked, B, L, units], only the sites and layers asked
            for.
    """

    hidden: Array
    taps: Mapping[str, Array]


class Site(NamedTuple):
    """A named place in a model where activations can be read or replaced.

    Attributes:
        units: number of units, the last axis of the site's value.
        layers: how many layers carry the site.
        consumer: leaf path of the kernel that reads the site, or None where several do.
        axis: axis of one layer's consumer that indexes the units.
        readers: leaf paths of all kernels whose input is the site's value.
        writers: leaf paths of kernels whose outputs lead to the site's value unit by
            unit, so that without an output its unit is 0 or unused.
        grouping: (heads, size), where several heads read one producing unit: each run of
            `size` outputs feeds `heads` runs of the site's units, side by side.
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
            `taps` maps a site to the layers whose values are wanted, `edits` maps a
            site to a function (value [B, L, units], layer int32[]) -> value, `until`
            stops after a layer.
        unembed: (params, hidden [..., D]) -> logits [..., V] float32.
        sites: the places `taps` and `edits` may name.
        config: what built the model, for exporters; None where nothing did.
        init_cache: (batch_size, length) -> empty key-value cache; None if it cannot
            decode.
            Rows are axis 0 of its arrays, or axis 1 of those of five axes, which have
            all layers; what has no axis counts the tokens of a row so far.
        decode: (params, batch, cache) -> (hidden, cache), appends the batch's tokens.
        prepare_decode: params -> params as a loop of `decode` reads them fastest; None where
            they are best as they are.
        rules: how the params lie on a mesh, for `sharding.by_rules`.
        low_rank: whether a kernel with `lora_a` and `lora_b` beside it (`wrap.lora`)
            adds x @ lora_a @ lora_b to its product.
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

    def __hash__(self) -> int:
        """By its functions, so that a model can be a static argument of jax.jit."""
        return hash((self.apply, self.unembed))


class Total(NamedTuple):
    """A sum and the number of things summed; division happens once, at the very end."""

    sum: Array
    count: Array

    def mean(self) -> Array:
        """sum / count, and 0 where nothing was counted."""
        count = self.count.astype(self.sum.dtype)
        return jax.numpy.where(count > 0, self.sum / jax.numpy.maximum(count, 1), 0)


Metrics = Mapping[str, Total]


class Term(Protocol):
    """A loss bound to a model and to the streams it reads. Pure.

    Attributes:
        reads: names of the streams the term reads.
        needs_ref: whether it runs the reference model.
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
    """What a step reads but never changes: passed as an argument, never donated.

    Attributes:
        params: the leaves that do not train (None where the leaf trains).
        ref_params: the reference model's parameters, or None if no term asks for them.
    """

    params: Params = None
    ref_params: Params | None = None
