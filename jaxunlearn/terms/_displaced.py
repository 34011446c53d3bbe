# SPDX-License-Identifier: Apache-2.0
"""A term at other parameters than those that train: sharpness, noise, attacks.

A displacement d is computed from the parameters and the batch, and the term is
evaluated at params + d. No gradient flows through d, so the gradient of the displaced
term is the term's gradient at the displaced point.
"""

import dataclasses
from typing import Protocol

import jax
import jax.numpy as jnp

from jaxunlearn import _checks, trees
from jaxunlearn.typing import Array, Metrics, Params, PRNGKey, Streams, Term, Total


class Move(Protocol):
    """Computes a displacement: (leaves that move, the others, streams, ref_params, key)
    -> a tree like the first.

    Attributes:
        reads: names of the streams it reads.
        needs_ref: whether it needs `ref_params`.
    """

    reads: tuple[str, ...]
    needs_ref: bool

    def __call__(
        self,
        params: Params,
        rest: Params,
        streams: Streams,
        ref_params: Params | None,
        key: PRNGKey,
    ) -> Params: ...


@dataclasses.dataclass(frozen=True)
class DisplacedTerm:
    """A term at params + d; see `displaced`."""

    term: Term
    move: Move
    leaves: str
    draws: int

    @property
    def reads(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys((*self.term.reads, *self.move.reads)))

    @property
    def needs_ref(self) -> bool:
        return self.term.needs_ref or self.move.needs_ref

    @property
    def parts(self) -> tuple:
        """The terms inside, as those of a JointTerm, for Recipe.reads."""
        inner = getattr(self.move, "term", None)
        found = [self.term] if inner is None else [self.term, inner]
        return tuple(
            part
            for term in found
            for part in getattr(term, "parts", ((None, 1.0, term),))
        )

    def check(self, streams: Streams) -> None:
        """As that of the term, if it has one."""
        if hasattr(self.term, "check"):
            self.term.check(streams)

    def __call__(
        self,
        params: Params,
        streams: Streams,
        ref_params: Params | None,
        key: PRNGKey,
    ) -> tuple[Total, Metrics]:
        moving, rest = trees.split(params, self.leaves)
        scores = []
        for draw in range(self.draws):
            of_move, of_term = jax.random.split(jax.random.fold_in(key, draw))
            by = self.move(moving, rest, streams, ref_params, of_move)
            there = jax.tree.map(
                lambda x, d: x + jax.lax.stop_gradient(d).astype(x.dtype), moving, by
            )
            there = trees.merge(there, rest)
            scores.append(self.term(there, streams, ref_params, of_term))
        if self.draws == 1:
            return scores[0]
        # All draws count the same rows, so the sums are averaged and one count stays.
        is_total = lambda x: isinstance(x, Total)  # noqa: E731
        return jax.tree.map(
            lambda *x: Total(sum(t.sum for t in x) / self.draws, x[0].count),
            *scores,
            is_leaf=is_total,
        )


def displaced(
    term: Term, move: Move, *, leaves: str = ".*", draws: int = 1
) -> DisplacedTerm:
    """The term at params + d, with d from `move` and without a gradient through d.

        sharp = terms.displaced(forget, terms.ascend(forget, radius=0.01), leaves=mlp)
        parts = {"forget": sharp, "retain": retain}

    | move | d | known from |
    | --- | --- | --- |
    | `ascend(term, radius)` | uphill, of a fixed length | SAM |
    | `gaussian(sigma)` with draws=3 | random | randomised smoothing |
    | `descend(term, learning_rate, steps)` | an attacker's steps | TAR, MUDMAN |
    | `toward_reference(weight)` | part of the way back | mode connectivity |

    With `num_microbatches` above 1, d is computed for each microbatch separately (for
    SAM this is known as m-SAM).

    Args:
        term: any term.
        move: what computes the displacement.
        leaves: pattern of the leaves that move, as for trees.split; give it the pattern
            of the leaves that train, so that no other gradient is computed for d.
        draws: number of displacements over which the loss is averaged, each with a
            separate key; only useful for a random move.
    Returns:
        A term on the streams of the term and of the move.
    Raises:
        ValueError: if draws is below 1; when run, if no leaf matches.
    References: https://arxiv.org/abs/2502.05374 (SAM, RS), 2408.00761 (TAR)
    """
    _checks.positive_int("terms.displaced", draws=draws)
    return DisplacedTerm(term, move, leaves, draws)


@dataclasses.dataclass(frozen=True)
class Ascend:
    """See `ascend`."""

    term: Term
    radius: float

    @property
    def reads(self) -> tuple[str, ...]:
        return self.term.reads

    @property
    def needs_ref(self) -> bool:
        return self.term.needs_ref

    def __call__(self, params, rest, streams, ref_params, key):
        grads = _gradient(self.term, params, rest, streams, ref_params, key)
        norm = trees.scaled_norm(grads)
        factor = self.radius / jnp.where(norm > 0, norm, 1.0)
        return jax.tree.map(lambda g: factor * g, grads)


def ascend(term: Term, *, radius: float) -> Ascend:
    """d = radius g / |g|, the direction in which the term's loss grows fastest.

    g is the gradient of the term's mean over the batch, and |g| its Euclidean norm over
    all leaves that move. d is 0 where g is 0.

    Args:
        term: usually the displaced term itself.
        radius: rho, the norm of d, > 0. The paper uses 0.01.
    Raises:
        ValueError: if radius is not > 0.
    References: https://arxiv.org/abs/2010.01412, https://arxiv.org/abs/2502.05374
    """
    _checks.positive("terms.ascend", radius=radius)
    return Ascend(term, radius)


@dataclasses.dataclass(frozen=True)
class Gaussian:
    """See `gaussian`."""

    sigma: float
    reads: tuple[str, ...] = ()
    needs_ref: bool = False

    def __call__(self, params, rest, streams, ref_params, key):
        leaves, tree = jax.tree.flatten(params)
        keys = jax.random.split(key, len(leaves))
        return tree.unflatten(
            self.sigma * jax.random.normal(k, x.shape, jnp.float32)
            for k, x in zip(keys, leaves, strict=True)
        )


def gaussian(sigma: float) -> Gaussian:
    """d is drawn from N(0, sigma^2) for every entry of the leaves that move.

    Args:
        sigma: standard deviation, > 0. The paper uses 1e-4 and 3 draws.
    Raises:
        ValueError: if sigma is not > 0.
    References: https://arxiv.org/abs/2502.05374
    """
    _checks.positive("terms.gaussian", sigma=sigma)
    return Gaussian(sigma)


@dataclasses.dataclass(frozen=True)
class Descend:
    """See `descend`."""

    term: Term
    learning_rate: float
    steps: int

    @property
    def reads(self) -> tuple[str, ...]:
        return self.term.reads

    @property
    def needs_ref(self) -> bool:
        return self.term.needs_ref

    def __call__(self, params, rest, streams, ref_params, key):
        def descend(moved, key):
            grads = _gradient(self.term, moved, rest, streams, ref_params, key)
            step = jax.tree.map(
                lambda x, g: (x - self.learning_rate * g).astype(x.dtype), moved, grads
            )
            return step, None

        start = jax.tree.map(jax.lax.stop_gradient, params)
        end, _ = jax.lax.scan(descend, start, jax.random.split(key, self.steps))
        return jax.tree.map(lambda a, b: _wide(a) - _wide(b), end, start)


def descend(term: Term, *, learning_rate: float, steps: int) -> Descend:
    """d is what an attacker's gradient descent on a term changes.

    The attacker takes `steps` steps of plain gradient descent on the rows of the batch:
    the displaced term is evaluated at the attacked parameters, and its gradient is
    applied to those before the attack (first order).

    Args:
        term: the attacker's loss, such as the NLL of the forget rows.
        learning_rate: of the attacker, > 0.
        steps: of the attacker, >= 1; each costs a forward and a backward pass.
    Raises:
        ValueError: if a setting is out of range.
    References: https://arxiv.org/abs/2408.00761, https://arxiv.org/abs/2506.12484
    """
    _checks.positive("terms.descend", learning_rate=learning_rate)
    _checks.positive_int("terms.descend", steps=steps)
    return Descend(term, learning_rate, steps)


@dataclasses.dataclass(frozen=True)
class TowardReference:
    """See `toward_reference`."""

    weight: float
    reads: tuple[str, ...] = ()
    needs_ref: bool = True

    def __call__(self, params, rest, streams, ref_params, key):
        if ref_params is None:
            raise ValueError(
                "terms.toward_reference needs the reference model, got ref_params=None."
                " Pass Frozen(params, ref_params=...) to the step, as Recipe.setup "
                "does."
            )
        ref = trees.paths(ref_params)
        return trees.map_with_path(
            lambda path, x: self.weight * (_wide(ref[path]) - _wide(x)), params
        )


def toward_reference(weight: float = 0.5) -> TowardReference:
    """d = weight (ref_params - params): a point on the line to the reference model.

    A loss that stays large there means that no straight path of low loss leads back to
    the original.

    Args:
        weight: in (0, 1]: 0.5 is the midpoint.
    Raises:
        ValueError: if weight is outside (0, 1].
    References: https://arxiv.org/abs/2505.22310
    """
    if not 0 < weight <= 1:
        raise ValueError(
            f"terms.toward_reference needs a weight in (0, 1], got weight={weight}."
        )
    return TowardReference(weight)


def _gradient(term, params, rest, streams, ref_params, key) -> Params:
    """Gradient of the term's mean, float32."""

    def mean(params):
        total, _ = term(trees.merge(params, rest), streams, ref_params, key)
        return jnp.sum(total.mean())

    return jax.tree.map(_wide, jax.grad(mean)(params))


def _wide(x: Array) -> Array:
    return x.astype(jnp.float32)
