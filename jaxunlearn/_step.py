# SPDX-License-Identifier: Apache-2.0
"""One unlearning step: a gradient for each term, one combined update, one new state.

    step = jax.jit(make_step({"forget": ..., "retain": ...}, tx), donate_argnums=0)
    state, metrics = step(state, streams, Frozen(rest, ref))

Nothing here knows a method's name: terms say what is differentiated, and the first link
of the optimizer chain (a combiner) says how the gradients meet.
"""

from collections.abc import Callable, Mapping

import flax.struct
import jax
import jax.numpy as jnp
import optax

from jaxunlearn import _checks, sharding, trees
from jaxunlearn.typing import (
    Array,
    Frozen,
    Metrics,
    Params,
    PRNGKey,
    PyTree,
    Rules,
    Streams,
    Term,
    Total,
)


@flax.struct.dataclass
class UnlearnState:
    """Everything a step changes; donated to each step.

    Attributes:
        step: int32[], updates applied so far.
        params: the leaves that train (None in the places of the others).
        opt_state: the optimizer chain's state.
        key: folded with `step` at every step, never itself advanced, so that a run
            resumed at a step draws what the uninterrupted run drew.
    """

    step: Array
    params: Params
    opt_state: PyTree
    key: PRNGKey


Step = Callable[..., tuple[UnlearnState, Mapping[str, Array]]]
"""(state, streams, frozen, rules=None) -> (state, metrics); see `make_step`."""


def init_state(
    params: Params, tx: optax.GradientTransformation, key: PRNGKey
) -> UnlearnState:
    """A fresh state holding copies of `params`, so that donating it harms nobody."""
    params = jax.tree.map(jnp.copy, params)
    return UnlearnState(jnp.int32(0), params, tx.init(params), jnp.copy(key))


def make_step(
    terms: Mapping[str, Term],
    tx: optax.GradientTransformation,
    *,
    num_microbatches: int = 1,
) -> Step:
    """Builds a pure function: (state, streams, frozen, rules=None) -> (state, metrics).

    Each term's gradient is accumulated by itself over the microbatches and divided once
    by the term's count; only then are the gradients combined. Ragged microbatches
    therefore give the update of the whole batch.

    Args:
        terms: the losses by name; one term for each gradient that the combiner must see
            apart.
        tx: an optimizer chain that begins with a combiner, such as
            optax.chain(combine.blur(gamma=0.1), optax.adamw(1e-5)).
        num_microbatches: into how many equal slices of rows each stream is cut; must divide
            them.
    Returns:
        A Step to be jitted with the state donated. `rules`, how the params lie on a
        mesh, come from sharding.jit_step; combiners get them too. Its metrics, all
        scalars: `<term>/loss`, whatever the term reports, `<term>/grad_norm`, the
        combiner's statistics under `combine/`, and `finite`. Where a loss or the
        float32 norm of a gradient is not finite (nan, inf, or beyond 1e19), `finite` is
        False and the state comes back unchanged; it is False too where the combiner
        says that its own numbers (a schedule's value, say) were not, and its update was
        zero.
    Raises:
        ValueError: if there is no term, or a stream's rows cannot be cut (when traced).
    """
    if not terms:
        raise ValueError("make_step needs at least one term, got none.")
    _checks.positive_int("make_step", num_microbatches=num_microbatches)

    def step(state, streams, frozen, rules=None):
        key = jax.random.fold_in(state.key, state.step)
        grads, values, metrics = {}, {}, {}
        for index, (name, term) in enumerate(terms.items()):
            fix = "Add it to your loader."
            _checks.has_keys(f"Term {name!r}", "stream", term.reads, streams, fix)
            own = {stream: streams[stream] for stream in term.reads}
            term_key = jax.random.fold_in(key, index)
            values[name], extra, grads[name] = _gradient(
                term, state.params, own, frozen, term_key, num_microbatches
            )
            metrics[f"{name}/loss"] = values[name]
            metrics |= {
                f"{name}/{label}": total.mean() for label, total in extra.items()
            }
        norms = _norms(grads, rules)
        metrics |= {f"{name}/grad_norm": norm for name, norm in norms.items()}
        finite = jnp.stack([jnp.isfinite(value) for value in metrics.values()]).all()

        extra = {"values": values} | ({} if rules is None else {"rules": rules})

        def update(state):
            updates, opt_state = tx.update(
                grads, state.opt_state, state.params, **extra
            )
            params = optax.apply_updates(state.params, updates)
            return state.replace(
                step=state.step + 1, params=params, opt_state=opt_state
            )

        # A conditional keeps donated buffers in place; selecting leaf by leaf copies.
        new = jax.lax.cond(finite, update, lambda state: state, state)
        stats = _combiner_stats(new.opt_state)
        verdicts = [
            value > 0 for label, value in stats.items() if label.endswith("/finite")
        ]
        finite = jnp.stack([finite, *verdicts]).all()
        return new, metrics | stats | {"finite": finite}

    return step


def _gradient(
    term: Term,
    params: Params,
    streams: Streams,
    frozen: Frozen,
    key: PRNGKey,
    num_microbatches: int,
) -> tuple[Array, Metrics, Params]:
    """The term's mean, what it reports, and the gradient of the mean."""

    def run(params, streams, key):
        return term(trees.merge(params, frozen.params), streams, frozen.ref_params, key)

    def mean(params, streams, key, count):
        total, extra = run(params, streams, key)
        value = jnp.sum(Total(total.sum, count).mean())
        return value, (total, extra)

    # What is counted depends on the masks alone, so the compiler drops this forward
    # pass and keeps the count of the whole batch, by which every microbatch can divide.
    count = jax.lax.stop_gradient(run(params, streams, key)[0].count)
    grad = jax.grad(mean, has_aux=True)
    if num_microbatches == 1:
        grads, (total, extra) = grad(params, streams, key, count)
        return jnp.sum(total.mean()), extra, grads

    slices = jax.tree.map(lambda x: _cut(x, num_microbatches), streams)
    keys = jax.random.split(key, num_microbatches)

    def accumulate(carry, piece):
        return jax.tree.map(jnp.add, carry, grad(params, *piece, count)), None

    shapes = jax.eval_shape(
        lambda: grad(params, jax.tree.map(lambda x: x[0], slices), keys[0], count)
    )
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
    (grads, (total, extra)), _ = jax.lax.scan(accumulate, zeros, (slices, keys))
    return jnp.sum(total.mean()), extra, grads


def _norms(grads: Mapping[str, Params], rules: Rules | None) -> dict[str, Array]:
    """Each term's float32 Euclidean norm; on a mesh one all-reduce for all of them."""

    def squares(_, *leaves):
        wide = [x.astype(jnp.float32) for x in leaves]
        return [jnp.sum(x * x) for x in wide]

    first, *others = (trees.paths(tree) for tree in grads.values())
    leaves = {path: [x, *(tree[path] for tree in others)] for path, x in first.items()}
    (sums,) = sharding.sums(squares, leaves, [range(len(leaves))], rules)
    return dict(zip(grads, jnp.sqrt(sums), strict=True))


def _cut(x: Array, num_microbatches: int) -> Array:
    rows = x.shape[0]
    if rows % num_microbatches:
        raise ValueError(
            f"make_step needs batches whose rows divide by num_microbatches={num_microbatches}, "
            f"got {rows} rows. Change the batch size or the number of microbatches."
        )
    # Strided, so that data-parallel devices keep the rows they already hold.
    return jnp.moveaxis(
        x.reshape(rows // num_microbatches, num_microbatches, *x.shape[1:]), 1, 0
    )


def _combiner_stats(opt_state: PyTree) -> dict[str, Array]:
    found = optax.tree_utils.tree_get_all_with_path(opt_state, "stats")
    return {f"combine/{k}": v for _, stats in found for k, v in stats.items()}
