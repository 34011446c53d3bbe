# SPDX-License-Identifier: Apache-2.0
"""One unlearning step: a gradient for each term, one combined update, one new state.

    step = jax.jit(make_step({"forget": ..., "retain": ...}, tx), donate_argnums=0)
    state, metrics = step(state, streams, Frozen(params, ref_params))

The step knows no method by name. Terms define what is differentiated, and the first
transformation of the optimizer chain (a combiner) defines how the gradients are
combined. `term_gradients` is the part of the step that a training loop of another shape
can call by itself.
"""

from collections.abc import Callable, Mapping

import flax.struct
import jax
import jax.numpy as jnp
import optax

from jaxunlearn import _checks, _precision, sharding, trees
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


SWALLOWED = "update/swallowed"

Step = Callable[..., tuple[UnlearnState, Mapping[str, Array]]]
"""(state, streams, frozen, rules=None, enabled=None) -> (state, metrics); see
`make_step`."""


def init_state(
    params: Params, tx: optax.GradientTransformation, key: PRNGKey
) -> UnlearnState:
    """A fresh state with copies of `params`, so that the caller's arrays survive
    donation."""
    params = jax.tree.map(jnp.copy, params)
    return UnlearnState(jnp.int32(0), params, tx.init(params), jnp.copy(key))


def term_gradients(
    terms: Mapping[str, Term],
    params: Params,
    streams: Streams,
    frozen: Frozen,
    key: PRNGKey,
    num_microbatches: int = 1,
) -> tuple[dict[str, Array], dict[str, Params], dict[str, Array]]:
    """The value and the gradient of each term by itself.

    A term's value is (sum of its loss over the batch) / (number of rows or tokens that
    count in the whole batch), and its gradient is the gradient of that quotient. The
    count of the whole batch divides every microbatch, so microbatches whose masks
    differ still add up to the gradient of the whole batch, and gradients are combined
    only after that. A term that counts nothing has value 0 and gradient 0.

    The function is pure; call it inside jax.jit. A training loop of another shape:

        model, params = models.from_nnx(lambda rngs: MyModule(rngs))
        parts = {
            "forget": terms.on_logps(losses.ascent, model, "forget", reduce="token"),
            "retain": terms.on_logps(losses.nll, model, "retain", reduce="token"),
        }
        tx = optax.chain(combine.blur(gamma=0.1), optax.adamw(1e-4))
        opt_state = tx.init(params)

        @jax.jit
        def update(params, opt_state, streams, key):
            values, grads, _ = ju.term_gradients(
                parts, params, streams, ju.Frozen(), key, num_microbatches=2
            )
            updates, opt_state = tx.update(grads, opt_state, params, values=values)
            return optax.apply_updates(params, updates), opt_state, values

    Args:
        terms: the losses by name; one term for each gradient that is needed separately.
        params: the leaves to differentiate, None in the places of the others.
        streams: a batch for each stream that a term reads; arrays with rows on axis 0.
        frozen: the other leaves, and the reference model where a term needs it.
        key: randomness of this call (dropout). Each term and each microbatch gets a
            different key.
        num_microbatches: into how many slices of equally many rows each stream is cut.
            The slices run one after the other and need that much less memory.
    Returns:
        (values, grads, metrics):
        values: term -> float32[], the term's mean over the whole batch.
        grads: term -> the gradient of that mean, a tree like `params`.
        metrics: "<term>/<label>" -> float32[], the mean of what the term reports.
    Raises:
        KeyError: if a term reads a stream that is not in `streams`.
        ValueError: if there is no term, `num_microbatches` is below 1 or does not
            divide a stream's rows. TypeError: if it is not an integer.
    """
    owner = "term_gradients"
    if not terms:
        raise ValueError(f"{owner} needs at least one term, got terms={{}}.")
    _checks.positive_int(owner, num_microbatches=num_microbatches)
    values, grads, metrics = {}, {}, {}
    for index, (name, term) in enumerate(terms.items()):
        fix = "Add it to your loader."
        _checks.has_keys(f"Term {name!r}", "stream", term.reads, streams, fix)
        batches = {stream: streams[stream] for stream in term.reads}
        values[name], reported, grads[name] = _gradient(
            term,
            params,
            batches,
            frozen,
            jax.random.fold_in(key, index),
            num_microbatches,
        )
        metrics |= {f"{name}/{label}": x.mean() for label, x in reported.items()}
    return values, grads, metrics


def make_step(
    terms: Mapping[str, Term],
    tx: optax.GradientTransformation,
    *,
    num_microbatches: int = 1,
) -> Step:
    """Builds a pure function: (state, streams, frozen, rules=None, enabled=None) ->
    (state, metrics).

    The step takes `term_gradients`, passes all of them to `tx`, and applies the update.

    A chain without a combiner is refused, as there is no one right way to combine
    gradients and the optimizer state is made outside (init_state): for the plain sum
    put combine.weighted_sum() first. optax.MultiSteps must not contain the combiner:
    it would have to add up gradients of several terms, and combining is not linear;
    use `num_microbatches`.

    Args:
        terms: the losses by name; one term for each gradient that the combiner must see
            separately.
        tx: an optimizer chain that begins with a combiner, such as
            optax.chain(combine.blur(gamma=0.1), optax.adamw(1e-5)).
        num_microbatches: into how many slices of equally many rows each stream is cut;
            see `term_gradients`.
    Returns:
        A Step to be jitted with the state donated. sharding.jit_step passes `rules`,
        the placement of the params on a mesh, which combiners also get. Its metrics,
        all scalars: `<term>/loss`, whatever the term reports, `<term>/grad_norm`, the
        combiner's statistics under `combine/`, and `finite`. Where `enabled`, a bool[],
        is False, the state is returned unchanged; `fit` passes the `finite` of the step
        before, which it has not read yet. If leaves that train are
        below float32, `update/swallowed` is the share of their update (of the sum of
        its absolute values) that belongs to entries that did not change: rounding
        swallowed it; see combine.with_rounding. Where a loss or the
        float32 norm of a gradient is not finite (nan, inf, or beyond 1e19), `finite` is
        False and the state is returned unchanged. It is also False where the combiner
        reports that its numbers (a schedule's value, for example) were not finite; its
        update is then zero.
    Raises:
        ValueError: if there is no term, or `num_microbatches` is below 1. When the step
            is traced: if `tx` does not begin with a combiner, and as `term_gradients`.
    """
    if not terms:
        raise ValueError("make_step needs at least one term, got terms={}.")
    _checks.positive_int("make_step", num_microbatches=num_microbatches)
    tx = optax.with_extra_args_support(tx)

    def step(state, streams, frozen, rules=None, enabled=None):
        key = jax.random.fold_in(state.key, state.step)
        values, grads, reported = term_gradients(
            terms, state.params, streams, frozen, key, num_microbatches
        )
        metrics = {f"{name}/loss": value for name, value in values.items()} | reported
        norms = _norms(grads, rules)
        metrics |= {f"{name}/grad_norm": norm for name, norm in norms.items()}
        finite = jnp.stack([jnp.isfinite(value) for value in metrics.values()]).all()

        extra = {"values": values} | ({} if rules is None else {"rules": rules})
        _begins_with_a_combiner(tx, grads, state)
        low = any(map(_precision.is_low, jax.tree.leaves(state.params)))

        def update(state):
            updates, opt_state = tx.update(
                grads, state.opt_state, state.params, **extra
            )
            params = jax.tree.map(_added, state.params, updates)
            lost = _swallowed(state.params, params, updates, rules) if low else {}
            return state.replace(
                step=state.step + 1, params=params, opt_state=opt_state
            ), lost

        def skip(state):
            return state, {SWALLOWED: jnp.float32(0)} if low else {}

        # A conditional keeps donated buffers in place; selecting leaf by leaf copies.
        runs = finite if enabled is None else finite & enabled
        new, lost = jax.lax.cond(runs, update, skip, state)
        metrics |= lost
        stats = _combiner_stats(new.opt_state)
        verdicts = [
            value > 0 for label, value in stats.items() if label.endswith("/finite")
        ]
        finite = jnp.stack([finite, *verdicts]).all()
        return new, metrics | stats | {"finite": finite}

    def check(streams: Streams) -> None:
        for term in terms.values():
            if hasattr(term, "check"):
                term.check(streams)

    # jax.jit copies both. `fit` calls `check` with every batch, and runs ahead of the
    # metrics of a step that can be disabled.
    step.check, step.takes_enabled = check, True
    return step


def _begins_with_a_combiner(
    tx: optax.GradientTransformationExtraArgs,
    grads: Mapping[str, Params],
    state: UnlearnState,
) -> None:
    """Raises ValueError for a chain that cannot combine the gradients of terms."""
    links = state.opt_state if type(state.opt_state) is tuple else (state.opt_state,)
    if links and isinstance(links[0], optax.MultiStepsState):
        raise ValueError(
            "make_step needs tx to begin with a combiner, got optax.MultiSteps around "
            "it. Take MultiSteps away and pass make_step(num_microbatches=...), which "
            "accumulates each term's gradient before they are combined."
        )
    plain = next(iter(grads.values()))
    try:
        updates, _ = jax.eval_shape(tx.update, plain, state.opt_state, state.params)
    except Exception:  # a combiner refuses gradients that are not those of terms
        return
    if jax.tree.structure(updates) == jax.tree.structure(plain):
        raise ValueError(
            "make_step needs tx to begin with a combiner, got a chain that takes the "
            "gradient of one loss. Put one first: optax.chain(combine.weighted_sum(), "
            "tx) adds the gradients of all terms."
        )


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
        total, reported = run(params, streams, key)
        value = jnp.sum(Total(total.sum, count).mean())
        return value, (total, reported)

    # What is counted depends on the masks alone, so the compiler drops this forward
    # pass and keeps the count of the whole batch, by which every microbatch can divide.
    count = jax.lax.stop_gradient(run(params, streams, key)[0].count)
    grad = jax.grad(mean, has_aux=True)
    if num_microbatches == 1:
        grads, (total, reported) = grad(params, streams, key, count)
        return jnp.sum(total.mean()), reported, grads

    slices = jax.tree.map(lambda x: _cut(x, num_microbatches), streams)
    keys = jax.random.split(key, num_microbatches)

    # optax.microbatching.microbatch would need one number of rows for all streams and
    # has no key for each slice, so only its way of cutting rows is used (`_cut`).
    def accumulate(carry, piece):
        return jax.tree.map(jnp.add, carry, grad(params, *piece, count)), None

    shapes = jax.eval_shape(
        lambda: grad(params, jax.tree.map(lambda x: x[0], slices), keys[0], count)
    )
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
    (grads, (total, reported)), _ = jax.lax.scan(accumulate, zeros, (slices, keys))
    return jnp.sum(total.mean()), reported, grads


def _norms(grads: Mapping[str, Params], rules: Rules | None) -> dict[str, Array]:
    """Each term's float32 Euclidean norm; on a mesh one all-reduce for all of them."""

    def squares(_, *leaves):
        wide = [x.astype(jnp.float32) for x in leaves]
        return [jnp.sum(x * x) for x in wide]

    first, *others = (trees.paths(tree) for tree in grads.values())
    leaves = {path: [x, *(tree[path] for tree in others)] for path, x in first.items()}
    (sums,) = sharding.sums(squares, leaves, [range(len(leaves))], rules)
    return dict(zip(grads, jnp.sqrt(sums), strict=True))


def _added(x: Array, update: Array) -> Array:
    """x + update, in the dtype of x."""
    wide = _precision.widest([x, update])
    return (x.astype(wide) + update.astype(wide)).astype(x.dtype)


def _swallowed(
    before: Params, after: Params, updates: Params, rules: Rules | None
) -> dict[str, Array]:
    """The share of the update, in absolute values, of low entries that are the same."""

    def totals(_, before, after, update):
        size = jnp.abs(update.astype(jnp.float32))
        return [jnp.sum(size), jnp.sum(jnp.where(before == after, size, 0.0))]

    columns = [trees.paths(tree) for tree in (before, after, updates)]
    leaves = {
        path: [column[path] for column in columns]
        for path, x in columns[0].items()
        if _precision.is_low(x)
    }
    ((size, lost),) = sharding.sums(totals, leaves, [range(len(leaves))], rules)
    return {SWALLOWED: lost / jnp.maximum(size, jnp.finfo(jnp.float32).tiny)}


def _cut(x: Array, num_microbatches: int) -> Array:
    rows = x.shape[0]
    if rows % num_microbatches:
        raise ValueError(
            "term_gradients needs batches whose rows divide by num_microbatches="
            f"{num_microbatches}, got {rows} rows. Change the batch size or the number "
            "of microbatches."
        )
    # Slice i takes the rows i, i + n, i + 2n, ..., so that data-parallel devices keep
    # the rows that they already hold.
    return optax.microbatching.reshape_batch_axis(x, rows // num_microbatches)


def _combiner_stats(opt_state: PyTree) -> dict[str, Array]:
    found = optax.tree_utils.tree_get_all_with_path(opt_state, "stats")
    return {f"combine/{k}": v for _, stats in found for k, v in stats.items()}
