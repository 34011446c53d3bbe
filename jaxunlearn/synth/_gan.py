# SPDX-License-Identifier: Apache-2.0
"""Pairs of generator and discriminator, one for each stream, trained by `fit`.

A pair is two terms: each differentiates its own network and holds the other fixed, so
that one step moves both at once (where other code alternates). Several pairs are more
terms of the same step, and state, checkpoints and the log are those of any run.
"""

import itertools
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxunlearn import _checks, _pixels, combine
from jaxunlearn._fit import Hook, NotFinite, fit
from jaxunlearn._step import init_state, make_step
from jaxunlearn.data import table as tables
from jaxunlearn.typing import Array, Params, PRNGKey, Streams, Total

GAN_LOSSES = ("nonsaturating", "hinge", "relativistic")


class Diverged(FloatingPointError):
    """The networks ran apart; training ended.

    Attributes:
        params: stream -> generator and discriminator, the last good ones.
        step: the number of updates they have.
        log: entries of all steps.
    """

    def __init__(self, message: str, params: Params, step: int, log: list):
        super().__init__(message)
        self.params, self.step, self.log = params, step, log


class GanTerm:
    """What one network of a pair minimises.

    | loss | discriminator (D real, G drawn) | generator |
    | --- | --- | --- |
    | nonsaturating | softplus(-D) + softplus(G) | softplus(-G) |
    | hinge | relu(1 - D) + relu(1 + G) | -G |
    | relativistic | softplus(G - D) | softplus(D - G) |

    The discriminator reports `right`, the share of images that it tells: D > 0 and
    G < 0, or with the relativistic loss, which has no zero of its own, D > G.

    With r1 > 0 the discriminator also pays (r1 / 2) |d D / d image|^2 at real images,
    and with the relativistic loss at drawn ones too, which makes it converge (Huang et
    al. 2024, arXiv 2501.05441).
    """

    needs_ref = False

    def __init__(self, gan: Any, stream: str, trains: str, loss: str, r1: float):
        self.gan, self.trains, self.loss, self.r1 = gan, trains, loss, r1
        self.stream, self.reads = stream, (stream,)

    def __call__(self, params, streams: Streams, ref, key: PRNGKey):
        pair = params[self.stream]
        hold = jax.lax.stop_gradient
        image = _pixels.as_float("A GAN", streams[self.stream]["image"])
        latents = jax.random.normal(key, (len(image), self.gan.config.latent))
        count = jnp.int32(len(image))
        relative = self.loss == "relativistic"
        if self.trains == "generator":
            judge = partial(self.gan.judge, hold(pair["discriminator"]))
            made = judge(self.gan.draw(pair["generator"], latents))
            real = judge(image) if relative else None
            return Total(jnp.sum(self._of_generator(made, real)), count), {}
        drawn = hold(self.gan.draw(pair["generator"], latents))
        judge = partial(self.gan.judge, pair["discriminator"])
        real, made = judge(image), judge(drawn)
        values = self._of_discriminator(real, made)
        if self.r1:
            for at in (image, drawn) if relative else (image,):
                slope = jax.grad(lambda x: jnp.sum(judge(x)))(at)
                values += self.r1 / 2 * jnp.sum(slope**2, axis=(1, 2, 3))
        told = (real > made,) if relative else (real > 0, made < 0)
        right = Total(jnp.sum(jnp.array(told), dtype=jnp.float32), len(told) * count)
        return Total(jnp.sum(values), count), {"right": right}

    def _of_generator(self, made: Array, real: Array | None) -> Array:
        if self.loss == "hinge":
            return -made
        return jax.nn.softplus(-made if real is None else real - made)

    def _of_discriminator(self, real: Array, made: Array) -> Array:
        if self.loss == "hinge":
            return jax.nn.relu(1 - real) + jax.nn.relu(1 + made)
        if self.loss == "relativistic":
            return jax.nn.softplus(made - real)
        return jax.nn.softplus(-real) + jax.nn.softplus(made)


def fit_gans(
    gan: Any,
    streams: Mapping[str, tables.Table],
    *,
    key: PRNGKey,
    steps: int,
    batch_size: int = 128,
    loss: str = "nonsaturating",
    r1: float = 0.0,
    learning_rate: float = 2e-4,
    betas: tuple[float, float] = (0.5, 0.999),
    limit: float = 30.0,
    patience: int = 20,
    every: int = 50,
    seed: int = 0,
    hooks: Sequence[Hook] = (),
) -> tuple[Params, list[dict]]:
    """Trains a generator and a discriminator for each stream, all in one step.

    Args:
        gan: such as models.gan.make gives.
        streams: name -> table of images of the gan's shape, such as the forget and the
            retain set.
        key: of the weights and the latents.
        steps: updates.
        batch_size: images of each stream a step.
        loss: "nonsaturating" (the original), "hinge" or "relativistic".
        r1: weight of the gradient penalty; about 1 to 10 with "relativistic", whose
            discriminator should have no norm.
        learning_rate, betas: of Adam.
        limit: a loss whose size exceeds it, `patience` steps on end or at the last
            step, has diverged.
        every: the networks are kept aside every so many steps without such a loss.
        seed: of the order of the images.
        hooks: as for fit.
    Returns:
        ({stream: {"generator", "discriminator"}}, log); forget the networks of the
        forget set after use, as they may have memorised it.
    Raises:
        Diverged: if a loss is not finite, too large for too long, or too large where
            the steps run out; it carries the last good networks.
        ValueError: for another loss, no stream, an empty one, or images out of range or
            of another shape. TypeError: for images of another dtype.
    """
    owner = "fit_gans"
    _checks.one_of(owner, GAN_LOSSES, loss=loss)
    _checks.not_negative(owner, r1=r1)
    _checks.positive(owner, limit=limit)
    _checks.positive_int(owner, patience=patience, every=every)
    for name, table in streams.items():
        _pixels.check(f"{owner}, for stream {name!r},", table, gan.config.shape)
    at = tables.batch_fn(streams, batch_size, seed=seed)
    terms, params = {}, {}
    for name, init_key in zip(
        streams, jax.random.split(key, len(streams)), strict=True
    ):
        params[name] = gan.init(init_key)
        for trains in ("generator", "discriminator"):
            terms[f"{name}/{trains}"] = GanTerm(gan, name, trains, loss, r1)
    tx = optax.chain(
        combine.weighted_sum(), optax.adam(learning_rate, b1=betas[0], b2=betas[1])
    )
    step = jax.jit(make_step(terms, tx), donate_argnums=0)
    watch = _Watch(terms, params, limit, patience, every)
    state = init_state(params, tx, key)
    try:
        loader = map(at, itertools.count())
        state, log = fit(step, state, loader, steps=steps, hooks=[watch, *hooks])
    except NotFinite as error:
        raise watch.diverged(f"{error}", error.log) from error
    if watch.bad:
        steps_on_end = f"{watch.bad} step{'s' * (watch.bad > 1)}"
        raise watch.diverged(
            f"A loss was beyond {limit} for {steps_on_end}: {watch.worst}.", log
        )
    return state.params, log


class _Watch:
    """A hook that keeps good networks aside, and stops where losses stay large."""

    def __init__(self, terms, params, limit, patience, every):
        self.names = [f"{name}/loss" for name in terms]
        self.limit, self.patience, self.every = limit, patience, every
        self.kept, self.step, self.bad, self.worst = params, 0, 0, ""

    def __call__(self, state, entry):
        values = {name: entry[name] for name in self.names}
        large = {k: v for k, v in values.items() if not abs(v) <= self.limit}
        self.bad = self.bad + 1 if large else 0
        self.worst = ", ".join(f"{name}={value:g}" for name, value in large.items())
        if not large and int(state.step) % self.every == 0:
            self.kept, self.step = jax.device_get(state.params), int(state.step)
        return self.bad >= self.patience

    def diverged(self, why: str, log: list) -> Diverged:
        return Diverged(
            f"fit_gans diverged. {why} The networks of step {self.step} are this "
            "error's `params`. Lower lr, or take loss='relativistic' with r1 > 0 and "
            "no norm in the discriminator.",
            self.kept,
            self.step,
            log,
        )


def draw_images(
    draw: Callable[[Params, Array], Array],
    generator: Params,
    count: int,
    *,
    latent: int,
    key: PRNGKey,
    batch_size: int = 128,
) -> np.ndarray:
    """Images [count, H, W, C] float32 of a generator, `batch_size` at a time."""
    _checks.positive_int("draw_images", count=count, latent=latent)
    run, found = jax.jit(draw), []
    for number in range(-(-count // batch_size)):
        latent_key = jax.random.fold_in(key, number)
        latents = jax.random.normal(latent_key, (batch_size, latent))
        found.append(np.asarray(run(generator, latents)))
    return np.concatenate(found)[:count]
