# SPDX-License-Identifier: Apache-2.0
"""Model inversion: a generator, trained through the model, draws images of buckets."""

import itertools
from collections.abc import Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxunlearn import _checks, _pixels, combine, losses
from jaxunlearn._fit import fit
from jaxunlearn._step import init_state, make_step
from jaxunlearn.data import table as tables
from jaxunlearn.synth import _condense
from jaxunlearn.typing import Frozen, Model, Params, PRNGKey, Total


def invert(
    model: Model,
    params: Params,
    table: tables.Table,
    buckets: np.ndarray,
    *,
    key: PRNGKey,
    steps: int,
    batch_size: int = 512,
    widths: Sequence[int] = (128, 512, 2048, 4096),
    learning_rate: float = 1e-3,
    seed: int = 0,
) -> _condense.Condensed:
    """One image per bucket, from a generator trained through the model.

    A perceptron g maps the bucket (one-hot) to an image. Over the images x with labels
    y and buckets e it minimises

        CE(f(g(e)), y) + mean (g(e) - x)^2

    where the model f is frozen. It is trained by `make_step` and `fit`.

    Args:
        model, params: f, run without dropout and with its stored statistics.
        table: the images of all buckets.
        buckets: [n] int >= 0; all images of a bucket have the same label.
        key: initialises the generator.
        steps: number of updates of Adam; the paper's code runs 200 epochs.
        batch_size: images per step.
        widths: of the hidden layers.
        learning_rate: of Adam.
        seed: orders the images.
    Returns:
        The images, one per bucket; their losses are cross-entropies under f, nats.
    Raises:
        ValueError: if the numbers of rows differ, a bucket has two labels, or images
            are out of range. TypeError: if images have another dtype, or buckets
            are not integers. NotFinite: as `fit`.
    References: Khan 2024, https://arxiv.org/abs/2402.00195
    """
    _checks.positive_int("synth.invert", steps=steps, batch_size=batch_size)
    labels = _condense.labels_of_buckets("synth.invert", table, buckets)
    names = np.array(sorted(labels), np.int64)
    place = np.searchsorted(names, np.asarray(buckets)).astype(np.int32)
    shape = np.shape(table["image"])[1:]
    sizes = (len(names), *widths, int(np.prod(shape)))
    generator = _init(key, sizes)

    draw = partial(_draw, shape=shape)
    term = _Inversion(model, draw)
    tx = optax.chain(combine.weighted_sum(), optax.adam(learning_rate))
    rows = tables.with_columns(table, {"place": place})
    at = tables.batch_fn({"data": rows}, min(batch_size, len(place)), seed=seed)
    step = jax.jit(make_step({"inversion": term}, tx), donate_argnums=0)
    state = init_state(generator, tx, key)
    loader = map(at, itertools.count())
    state, _ = fit(step, state, loader, Frozen(None, params), steps=steps)

    places = np.arange(len(names), dtype=np.int32)
    made = np.asarray(jax.jit(draw)(state.params, places))
    small = _condense.one_a_bucket(made, labels, names)
    values = jax.jit(partial(_cross_entropy, model))(params, small)
    return _condense.Condensed(small, names, np.asarray(values))


class _Inversion:
    """The term of `invert`; the params of the frozen model are its ref_params."""

    reads = ("data",)
    needs_ref = True

    def __init__(self, model, draw):
        self.model, self.draw = model, draw

    def __call__(self, params, streams, ref, key):
        batch = streams["data"]
        made = self.draw(params, batch["place"])
        entropy = _cross_entropy(self.model, ref, {**batch, "image": made})
        image = _pixels.as_float("synth.invert", batch["image"])
        error = jnp.mean((made - image) ** 2, axis=(1, 2, 3))
        count = jnp.int32(len(made))
        parts = {"ce": Total(entropy.sum(), count), "mse": Total(error.sum(), count)}
        return Total(jnp.sum(entropy + error), count), parts


def _cross_entropy(model, params, batch):
    hidden = model.apply(params, batch).hidden[:, 0]
    logits = model.unembed(params, hidden)
    return losses.nll(losses.token_logps(logits, batch["tokens"][:, 1]))


def _init(key, sizes):
    start = jax.nn.initializers.he_normal()
    keys = jax.random.split(key, len(sizes) - 1)
    pairs = zip(keys, sizes[:-1], sizes[1:], strict=True)
    layers = [{"kernel": start(k, (a, b)), "bias": jnp.zeros(b)} for k, a, b in pairs]
    # An input selects one row of the first kernel, so its fan-in is 1, not sizes[0].
    layers[0]["kernel"] *= (sizes[0] / 2) ** 0.5
    return {str(i): layer for i, layer in enumerate(layers)}


def _draw(params: Params, place, *, shape):
    """The generator: images [b, H, W, C] of buckets [b]."""
    *inner, last = (params[str(i)] for i in range(len(params)))
    x = jax.nn.relu(inner[0]["kernel"][place] + inner[0]["bias"])
    for layer in inner[1:]:
        x = jax.nn.relu(x @ layer["kernel"] + layer["bias"])
    x = x @ last["kernel"] + last["bias"]
    return x.reshape(-1, *shape)
