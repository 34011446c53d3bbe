# SPDX-License-Identifier: Apache-2.0
"""The Recipe, and the pieces that several recipes share."""

import re
from collections.abc import Mapping, Sequence
from functools import partial
from typing import NamedTuple

import jax
import optax
from jax.sharding import Mesh

from jaxunlearn import _checks, combine, losses, sharding, terms, trees
from jaxunlearn._step import Step, UnlearnState, init_state, make_step
from jaxunlearn.typing import Frozen, Model, Params, PRNGKey, Rules, Term

Rate = float | optax.Schedule


class Setup(NamedTuple):
    """What `fit` takes: `fit(setup.step, setup.state, loader, setup.frozen, steps=n)`.

    Attributes:
        step: jitted, (state, streams, frozen) -> (state, metrics); donates the state.
        state: before the first update; it holds copies of the leaves that train.
        frozen: the leaves that do not train, shared with the caller's params, and the
            reference model where a term needs it.
    """

    step: Step
    state: UnlearnState
    frozen: Frozen


class Recipe(NamedTuple):
    """A method that is ready to run.

        step, state, frozen = recipe.setup(model, params)
        state, log = ju.fit(step, state, loader, frozen, steps=100)
        params = trees.merge(state.params, frozen.params)

    Attributes:
        terms: what make_step differentiates.
        tx: combiner, clipping and optimizer in one chain.
        trainable: pattern for trees.split of the leaves (or layers of them) that train.
            Where a matching kernel has LoRA leaves, `split` trains those instead.
    """

    terms: Mapping[str, Term]
    tx: optax.GradientTransformationExtraArgs
    trainable: str = r".*"

    @property
    def needs_ref(self) -> bool:
        """Whether a term runs the reference model."""
        return any(term.needs_ref for term in self.terms.values())

    def reads(self) -> dict[str, set[str]]:
        """The streams that the terms read, and the columns that each must have."""
        found: dict[str, set[str]] = {}
        for term in self.terms.values():
            for _, _, part in getattr(term, "parts", [(None, None, term)]):
                for stream in part.reads:
                    found.setdefault(stream, set()).update(getattr(part, "columns", ()))
        return found

    def pairs(self) -> list[tuple[str, ...]]:
        """The groups of streams that a term reads row by row; see data.paired."""
        found: dict[tuple[str, ...], None] = {}
        for term in self.terms.values():
            for _, _, part in getattr(term, "parts", [(None, None, term)]):
                if getattr(part, "paired", False):
                    found[part.reads] = None
        return list(found)

    def split(
        self, params: Params, ref_params: Params | None = None
    ) -> tuple[Params, Frozen]:
        """The leaves that train, and what is frozen.

        Without LoRA leaves the leaves that match `trainable` train. A kernel that
        matches and has leaves `lora_a` and `lora_b` (wrap.add_lora) stays frozen, and
        these two train in its place, at the same layers; if there is such a kernel,
        nothing else trains. So r".*" trains all LoRA leaves and no other leaf. A
        pattern that matches no kernel with LoRA leaves (one of projections, for
        example) is used unchanged.

        Args:
            params: of the whole model, or their shapes. Nothing is copied but chosen
                layers.
            ref_params: of the reference model; `params` if None and a term needs it.
        Returns:
            (train, Frozen), with None in the places of the others; trees.merge(train,
            frozen.params) gives the params again.
        Raises:
            ValueError: if no leaf matches.
        """
        train, rest = trees.split(params, _with_lora(params, self.trainable))
        if ref_params is None and self.needs_ref:
            ref_params = params
        return train, Frozen(rest, ref_params)

    def setup(
        self,
        model: Model,
        params: Params,
        *,
        mesh: Mesh | None = None,
        key: PRNGKey | None = None,
        num_microbatches: int = 1,
        ref_params: Params | None = None,
        rounding: str = "nearest",
        moments: str = "float32",
        rules: Rules | None = None,
        host: str | None = None,
    ) -> Setup:
        """The jitted step, the first state and what is frozen.

        Args:
            model: the model that the recipe was made for; its rules place the params.
            params: of the whole model, with LoRA leaves or directions where it has
                them. The caller's arrays survive.
            mesh: where to train; params that are elsewhere are moved there by
                model.rules. None trains on one device.
            key: randomness of all steps (dropout); jax.random.key(0) if None.
            num_microbatches: as for make_step.
            ref_params: of the reference model; `params` if None and a term needs it.
            rounding: how updates of params below float32 are rounded: "nearest",
                "stochastic" or "masters"; see combine.with_rounding. It has no effect
                on float32 params.
            moments: how the optimizer's moments are stored: "float32", "bfloat16" or
                "int8"; see combine.with_moments.
            rules: the placement on the mesh; model.rules if None. See sharding.zero.
            host: pattern of the leaves of the state that are kept in the host's memory,
                such as sharding.HOST; needs a mesh (of one device, for example).
        Returns:
            A Setup; it unpacks as (step, state, frozen).
        Raises:
            ValueError: if no leaf matches `trainable`, the mesh does not divide the
                leaves, rounding or moments are unknown, or rules or host come without a
                mesh.
        """
        if mesh is None and (rules is not None or host is not None):
            raise ValueError(
                "Recipe.setup needs mesh with rules and host, got mesh=None. Pass "
                "mesh=sharding.make_mesh(), which takes all devices."
            )
        rules = model.rules if rules is None else rules
        key = jax.random.key(0) if key is None else key
        if mesh is not None:
            params, ref_params = (
                x if x is None else jax.device_put(x, sharding.by_rules(x, mesh, rules))
                for x in (params, ref_params)
            )
        train, frozen = self.split(params, ref_params)
        tx = combine.with_moments(self.tx, moments)
        tx = combine.with_rounding(tx, rounding)
        step = make_step(self.terms, tx, num_microbatches=num_microbatches)
        fresh = partial(init_state, tx=tx)
        if mesh is None:
            return Setup(jax.jit(step, donate_argnums=0), fresh(train, key=key), frozen)
        state = sharding.create(fresh, mesh, rules, train, key=key, host=host)
        step = sharding.jit_step(step, mesh, rules, state, host=host)
        return Setup(step, state, frozen)


def _with_lora(params: Params, pattern: str) -> str:
    """The pattern, with each kernel that has LoRA leaves replaced by those."""
    leaves, (pattern, at, layers) = trees.paths(params), pattern.partition("@")
    places = [
        re.escape(path.removesuffix("kernel"))
        for path in leaves
        if re.fullmatch(pattern, path)
        and path.endswith("kernel")
        and path.removesuffix("kernel") + "lora_a" in leaves
    ]
    if places:
        pattern = f"(?:{'|'.join(places)})lora_[ab]"
    return pattern + at + layers


def chain(
    combiner: optax.GradientTransformationExtraArgs,
    *,
    learning_rate: Rate,
    weight_decay: float,
    clip: float | None,
    eps: float = 1e-8,
) -> optax.GradientTransformationExtraArgs:
    """combiner -> clip by global norm -> AdamW; BLUR needs this order."""
    links = [] if clip is None else [optax.clip_by_global_norm(clip)]
    adamw = optax.adamw(learning_rate, eps=eps, weight_decay=weight_decay)
    return optax.chain(combiner, *links, adamw)


def retain_nll(model: Model, retain: Mapping[str, float]) -> Term:
    """One term: the weighted token-mean NLL of one or several retain streams."""
    parts = retain_parts(model, retain)
    if len(parts) == 1 and set(retain.values()) == {1.0}:
        return next(iter(parts.values()))
    return terms.joint(parts, retain)


def forget_npo(model: Model, *, beta: float) -> terms.BoundTerm:
    """NPO on the stream `forget`, whose batches have `ref_logps`."""
    return terms.on_logps(partial(losses.npo, beta=beta), model, "forget")


def weighted(
    parts: Mapping[str, terms.BoundTerm],
    weights: Mapping[str, float],
    *,
    learning_rate: Rate,
    weight_decay: float,
    clip: float | None,
    eps: float = 1e-8,
    trainable: str = r".*",
) -> Recipe:
    """A Recipe of one joint term of weighted parts -> clip -> AdamW."""
    total = terms.joint(parts, weights)
    optimizer = dict(
        learning_rate=learning_rate, weight_decay=weight_decay, clip=clip, eps=eps
    )
    tx = chain(combine.weighted_sum(), **optimizer)
    return Recipe({"total": total}, tx, trainable)


def retain_parts(
    model: Model, retain: Mapping[str, float], kind: str = "nll"
) -> dict[str, terms.BoundTerm]:
    """A term for each retain stream: "nll" of its answers, or "kl" to the reference."""
    _checks.one_of("The recipe", ("nll", "kl"), retain_loss=kind)
    if kind == "kl":
        return {name: terms.on_tokens(losses.kl, model, name) for name in retain}
    return {
        name: terms.on_logps(losses.nll, model, name, reduce="token") for name in retain
    }


def layers(model: Model, wanted: Sequence[int]) -> tuple[int, ...]:
    """The layers in ascending order; raises if the model lacks one of them."""
    wanted = tuple(sorted(wanted))
    if "block" not in model.sites:
        raise ValueError(
            "This recipe needs a model with the site 'block', whose output it reads, "
            f"got sites {_checks.listed(model.sites)}. Use models.make."
        )
    count = model.sites["block"].layers
    if not wanted or not 0 <= wanted[0] <= wanted[-1] < count:
        raise ValueError(
            f"This recipe needs layers from 0 to {count - 1}, got layers={wanted}. "
            "Pass layers=(...) that fit the depth of the model."
        )
    return wanted
