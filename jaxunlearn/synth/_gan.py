# SPDX-License-Identifier: Apache-2.0
"""GANs: one generator and one discriminator for each stream, trained by `fit`.

A pair of networks has two terms. Each term differentiates one network and holds the
other constant, so one step updates both at the same time (other code alternates).
Several pairs are more terms of the same step. State, checkpoints and log are those of
every run of `fit`.
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
    """Training of a GAN diverged and was stopped.

    Attributes:
        params: stream -> generator and discriminator, before the divergence.
        step: number of updates of these params.
        log: the log entries of all steps.
    """

    def __init__(self, message: str, params: Params, step: int, log: list):
        super().__init__(message)
        self.params, self.step, self.log = params, step, log


class GanTerm:
    """The loss of one network of a pair.

    D is the discriminator's output for real images, G that for generated images.

    | loss | discriminator | generator |
    | --- | --- | --- |
    | nonsaturating | softplus(-D) + softplus(G) | softplus(-G) |
    | hinge | relu(1 - D) + relu(1 + G) | -G |
    | relativistic | softplus(G - D) | softplus(D - G) |

    The discriminator reports `right`, its accuracy: the fraction of images with D > 0
    or G < 0. The relativistic loss has no threshold at 0; there it is the fraction of
    pairs with D > G.

    With r1 > 0 the discriminator has the gradient penalty (r1 / 2) |d D / d image|^2 at
    real images, and with the relativistic loss also at generated ones, which makes
    training converge (Huang et al. 2024, arXiv 2501.05441).
    """

    needs_ref = False

    def __init__(self, gan: Any, stream: str, trains: str, loss: str, r1: float):
        self.gan, self.trains, self.loss, self.r1 = gan, trains, loss, r1
        self.stream, self.reads = stream, (stream,)

    def __call__(self, params, streams: Streams, ref, key: PRNGKey):
        pair = params[self.stream]
        constant = jax.lax.stop_gradient
        image = _pixels.as_float("A GAN", streams[self.stream]["image"])
        latents = jax.random.normal(key, (len(image), self.gan.config.latent))
        count = jnp.int32(len(image))
        relative = self.loss == "relativistic"
        if self.trains == "generator":
            judge = partial(self.gan.discriminate, constant(pair["discriminator"]))
            made = judge(self.gan.generate(pair["generator"], latents))
            real = judge(image) if relative else None
            return Total(jnp.sum(self._of_generator(made, real)), count), {}
        drawn = constant(self.gan.generate(pair["generator"], latents))
        judge = partial(self.gan.discriminate, pair["discriminator"])
        real, made = judge(image), judge(drawn)
        values = self._of_discriminator(real, made)
        if self.r1:
            for at in (image, drawn) if relative else (image,):
                slope = jax.grad(lambda x: jnp.sum(judge(x)))(at)
                values += self.r1 / 2 * jnp.sum(slope**2, axis=(1, 2, 3))
        hits = (real > made,) if relative else (real > 0, made < 0)
        right = Total(jnp.sum(jnp.array(hits), dtype=jnp.float32), len(hits) * count)
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
    max_loss: float = 30.0,
    patience: int = 20,
    snapshot_every: int = 50,
    seed: int = 0,
    hooks: Sequence[Hook] = (),
) -> tuple[Params, list[dict]]:
    """Trains a generator and a discriminator for each stream, all in one step.

    Args:
        gan: networks, such as those of models.gan.make.
        streams: name -> table of images with the shape of the gan, such as the forget
            and the retain set.
        key: initialises the weights and draws the latents.
        steps: number of updates.
        batch_size: images of each stream per step.
        loss: "nonsaturating" (the original GAN loss), "hinge" or "relativistic".
        r1: weight of the gradient penalty. With "relativistic" use 1 to 10, and a
            discriminator without normalisation.
        learning_rate, betas: of Adam.
        max_loss: a loss whose absolute value exceeds max_loss in `patience` consecutive
            steps, or at the last step, counts as diverged.
        patience: see max_loss.
        snapshot_every: the networks are stored every so many steps, if all losses are
            within max_loss.
        seed: orders the images.
        hooks: as for `fit`.
    Returns:
        ({stream: {"generator", "discriminator"}}, log). Delete the networks of the
        forget set after use, because they may have memorised it.
    Raises:
        Diverged: if a loss is not finite, is too large for `patience` steps, or is too
            large at the last step; it has the networks from before the divergence.
        ValueError: if the loss is unknown, there is no stream or an empty one, or
            images have another shape or are out of range. TypeError: if images have
            another dtype.
    """
    owner = "fit_gans"
    _checks.one_of(owner, GAN_LOSSES, loss=loss)
    _checks.not_negative(owner, r1=r1)
    _checks.positive(owner, max_loss=max_loss)
    _checks.positive_int(owner, patience=patience, snapshot_every=snapshot_every)
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
    watch = _Watch(terms, params, max_loss, patience, snapshot_every)
    state = init_state(params, tx, key)
    try:
        loader = map(at, itertools.count())
        state, log = fit(step, state, loader, steps=steps, hooks=[watch, *hooks])
    except NotFinite as error:
        raise watch.diverged(f"{error}", error.log) from error
    if watch.bad:
        raise watch.diverged(
            f"A loss exceeded max_loss={max_loss} in the last {watch.bad} step(s): "
            f"{watch.worst}.",
            log,
        )
    return state.params, log


class _Watch:
    """A hook that stores good networks, and stops training if losses stay large."""

    def __init__(self, terms, params, max_loss, patience, snapshot_every):
        self.names = [f"{name}/loss" for name in terms]
        self.max_loss, self.patience = max_loss, patience
        self.snapshot_every, self.snapshot, self.step = snapshot_every, params, 0
        self.bad, self.worst = 0, ""

    def __call__(self, state, entry):
        values = {name: entry[name] for name in self.names}
        large = {k: v for k, v in values.items() if not abs(v) <= self.max_loss}
        self.bad = self.bad + 1 if large else 0
        self.worst = ", ".join(f"{name}={value:g}" for name, value in large.items())
        if not large and int(state.step) % self.snapshot_every == 0:
            self.snapshot, self.step = jax.device_get(state.params), int(state.step)
        return self.bad >= self.patience

    def diverged(self, why: str, log: list) -> Diverged:
        return Diverged(
            f"fit_gans diverged. {why} The attribute `params` of this error has the "
            f"networks of step {self.step}. Lower learning_rate, or use "
            "loss='relativistic' with r1 > 0 and a discriminator without norm.",
            self.snapshot,
            self.step,
            log,
        )


def draw_images(
    draw: Callable[[Params, Array], Array],
    generator: Params,
    num_images: int,
    *,
    latent: int,
    key: PRNGKey,
    batch_size: int = 128,
) -> np.ndarray:
    """Generates images, `batch_size` at a time.

    Args:
        draw: (generator, latents [b, latent]) -> images, such as `generate` of a Gan.
        generator: the params of the generator.
        num_images: number of images.
        latent: size of a latent vector.
        key: draws the latents.
        batch_size: images at a time.
    Returns:
        [num_images, H, W, C] float32.
    """
    _checks.positive_int("draw_images", num_images=num_images, latent=latent)
    run, found = jax.jit(draw), []
    for index in range(-(-num_images // batch_size)):
        latent_key = jax.random.fold_in(key, index)
        latents = jax.random.normal(latent_key, (batch_size, latent))
        found.append(np.asarray(run(generator, latents)))
    return np.concatenate(found)[:num_images]
