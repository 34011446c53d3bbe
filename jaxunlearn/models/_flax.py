# SPDX-License-Identifier: Apache-2.0
"""Flax modules as Models, and back.

    model, params = models.from_nnx(lambda rngs: MyLM(rngs), hidden=..., unembed=...)
    ...                                        # unlearn
    module = models.to_nnx(model, params)      # MyLM again, with the new params

    model, params = models.from_linen(MyLM(), variables, hidden=..., unembed=...)
    view = models.nnx_view(model, params)      # any Model as one NNX module

Terms, combiners and steps use such a model like any other. It has no named sites, so
`taps`, `edits` and `until` are errors.
"""

import dataclasses
import inspect
from collections.abc import Callable, Mapping
from typing import Any

import flax.core
import flax.linen
import jax
import jax.numpy as jnp
from flax import nnx

from jaxunlearn import _checks, trees
from jaxunlearn.typing import Array, Batch, Model, Outputs, Params, PRNGKey, PyTree

Hidden = Callable[[Any, Batch], Array]
Unembed = Callable[[Any, Array], Array]


class ModelView(nnx.Module):
    """A Model with its params as a stateful NNX module; made by `nnx_view`.

    Its state has the paths of the params: nnx.to_pure_dict(nnx.state(view)) is the
    params tree.
    """

    def __init__(self, model: Model, params: Params):
        self.model = model
        for name, value in params.items():
            if hasattr(self, name):
                raise ValueError(
                    f"nnx_view needs params without the key {name!r}, which is an "
                    "attribute of the view. Rename that key."
                )
            setattr(self, name, _variables(value))

    def __call__(self, tokens: Array, mask: Array | None = None) -> Array:
        """Logits [B, L, V] float32 of tokens [B, L]; every token is real by default."""
        mask = jnp.ones(tokens.shape, jnp.bool_) if mask is None else mask
        params = self.params()
        hidden = self.model.apply(params, {"tokens": tokens, "mask": mask}).hidden
        return self.model.unembed(params, hidden)

    def params(self) -> Params:
        """The params as a plain nested dict, without copying an array."""
        return nnx.to_pure_dict(nnx.state(self, nnx.Param))


def nnx_view(model: Model, params: Params) -> ModelView:
    """The model and its params as one Flax NNX module.

    For code that needs a module: nnx.split, nnx.state, nnx.jit, nnx.value_and_grad and
    nnx.Optimizer work on it. The arrays are shared with `params`, not copied. Calling
    it makes logits of shape [B, L, V], which terms never do. To get the module that
    `from_nnx` was given, use `to_nnx`.

    Args:
        model: such as models.make gives.
        params: nested dict of arrays for it.
    Returns:
        A module; view(tokens, mask=None) -> logits, view.params() -> params.
    """
    return ModelView(model, params)


def from_nnx(
    module_or_factory: nnx.Module | Callable[[nnx.Rngs], nnx.Module],
    *,
    hidden: Hidden | None = None,
    unembed: Unembed | None = None,
) -> tuple[Model, Params]:
    """A Model and its params from a Flax NNX language model; `to_nnx` is the way back.

    Without `hidden` and `unembed` the module is called with the tokens and must return
    logits, which then take the place of hidden states, so that an array [B, L, V]
    exists in every pass. Give both functions for a large vocabulary. The module sees
    only the inputs that `hidden` passes to it: one that ignores the mask must be causal
    and its batches padded on the right.

    Dropout is on if and only if `Model.apply` gets a key, which terms pass during
    training: `deterministic` is then set to False on every submodule that has it, and
    every random stream is seeded with that key. `unembed` and the reference model of a
    term run without dropout. State that is not an nnx.Param (batch statistics, caches)
    is constant: it is never updated, and normalisation layers use their running
    averages.

    Args:
        module_or_factory: a module, or a function that makes one from nnx.Rngs.
        hidden: (module, batch) -> [B, L, D]; hidden states that `unembed` can read.
        unembed: (module, hidden [..., D]) -> logits [..., V].
    Returns:
        (model, params). Params is a plain nested dict of the module's nnx.Param arrays,
        keyed by strings (entries of an nnx.List by "0", "1", ...). A factory is called
        with seed 0. `Model.init` calls it with another key; for a module it raises.
    Raises:
        TypeError: if the argument is neither. ValueError: if only one of `hidden` and
            `unembed` is given.
    """
    _both("from_nnx", hidden, unembed)
    factory = None if isinstance(module_or_factory, nnx.Module) else module_or_factory
    linen = isinstance(factory, flax.linen.Module)
    if factory is not None and (linen or not callable(factory)):
        raise TypeError(
            "from_nnx needs an nnx.Module or a function from nnx.Rngs to one, got "
            f"{type(factory).__name__}. For flax.linen modules use from_linen."
        )
    module = module_or_factory if factory is None else factory(nnx.Rngs(0))
    graph, state, others = nnx.split(module, nnx.Param, ...)
    paths = tuple(path for path, _ in nnx.to_flat_state(state))
    tags = {
        variable.tag
        for _, variable in nnx.to_flat_state(others)
        if isinstance(variable, nnx.RngState)
    }
    source = _NnxModule(graph, paths, nnx.to_pure_dict(others))

    def merge(params, key):
        module = source.merge(params)
        module.set_attributes(
            deterministic=key is None,
            use_running_average=True,
            raise_if_not_found=False,
        )
        if key is not None:
            seeds = {t: jax.random.fold_in(key, i) for i, t in enumerate(sorted(tags))}
            nnx.reseed(module, policy="match_shape", **seeds)
        return module

    def run(params, batch, key):
        module = merge(params, key)
        if hidden is not None:
            return hidden(module, batch)
        return _call(module, batch["tokens"], key is None)

    def head(params, x):
        return x if unembed is None else unembed(merge(params, None), x)

    def init(key):
        if factory is None:
            raise ValueError(
                "Model.init needs a factory, got a finished module. Call "
                "from_nnx(lambda rngs: ...), or use the params that it returned."
            )
        return _plain(nnx.split(factory(nnx.Rngs(key)), nnx.Param, ...)[1])

    model = _model("from_nnx", init, run, head)
    return model._replace(config=source), _plain(state)


def to_nnx(model: Model, params: Params) -> nnx.Module:
    """The user's NNX module with these params.

        model, params = models.from_nnx(module)
        module = models.to_nnx(model, params)      # as it was

    Args:
        model: from `from_nnx`.
        params: of the whole model, such as trees.merge(state.params, frozen.params);
            with LoRA, wrap.merge_lora(model, params). The arrays are shared, not
            copied.
    Returns:
        A new module of the same class and attributes (its mode too), with the batch
        statistics and random streams that the module had when `from_nnx` read it.
    Raises:
        TypeError: if the model is not from `from_nnx`. ValueError: if the params have
            other leaves than the module.
    """
    source = model.config
    if not isinstance(source, _NnxModule):
        raise TypeError(
            "to_nnx needs a model that from_nnx made, got a Model with config="
            f"{type(source).__name__}. Use nnx_view for other models."
        )
    wanted = {"/".join(map(str, path)) for path in source.paths}
    found = set(trees.paths(params))
    if wanted != found:
        raise ValueError(
            f"to_nnx needs params with the module's leaves, got params without "
            f"{_checks.listed(sorted(wanted - found))} and with "
            f"{_checks.listed(sorted(found - wanted))} too. Merge halves of a split "
            "with trees.merge, and LoRA leaves with wrap.merge_lora."
        )
    return source.merge(params)


@dataclasses.dataclass(frozen=True, eq=False)
class _NnxModule:
    """What a module is besides its params; the `config` of its Model."""

    graph: Any
    paths: tuple[tuple, ...]
    constants: PyTree

    def merge(self, params: Params) -> nnx.Module:
        flat = {path: _at(params, path) for path in self.paths}
        return nnx.merge(self.graph, _nested(flat), self.constants)


def from_linen(
    module: flax.linen.Module,
    params: PyTree | None = None,
    *,
    sample: Batch | None = None,
    hidden: str | Hidden | None = None,
    unembed: str | Unembed | None = None,
) -> tuple[Model, Params]:
    """A Model from a flax.linen language model.

    Without `hidden` and `unembed` the module is called with the tokens and must return
    logits, which then take the place of hidden states, so that an array [B, L, V]
    exists in every pass. Give both for a large vocabulary. A module that does not get
    the mask must be causal and its batches padded on the right.

    Dropout is on if and only if `Model.apply` gets a key, which terms pass during
    training; it becomes the random stream "dropout". A method given by name is called
    with deterministic=(no key) if it has that parameter; a function can call
    module.has_rng("dropout"). Collections other than "params" are constants.

    Args:
        module: the module, unbound.
        params: its variables ({"params": ..., ...}) or the params alone; None makes
            them with seed 0.
        sample: the batch that `Model.init` traces the module with; 8 tokens if None.
        hidden: name of the method (tokens) -> [B, L, D], or a function (bound module,
            batch).
        unembed: name of the method (hidden [..., D]) -> logits [..., V], or a function
            (bound module, hidden).
    Returns:
        (model, params), params without the "params" level.
    Raises:
        TypeError: if module is not a linen module. ValueError: if only one of `hidden`
            and `unembed` is given.
    """
    _both("from_linen", hidden, unembed)
    if not isinstance(module, flax.linen.Module):
        raise TypeError(
            f"from_linen needs a flax.linen.Module, got {type(module).__name__}. "
            "For flax.nnx modules use from_nnx."
        )

    def run_bound(module, batch, deterministic):
        if callable(hidden):
            return hidden(module, batch)
        method = getattr(module, hidden or "__call__")
        return _call(method, batch["tokens"], deterministic)

    def head_bound(module, x):
        if callable(unembed):
            return unembed(module, x)
        return x if unembed is None else getattr(module, unembed)(x)

    def forward(module, batch):
        return head_bound(module, run_bound(module, batch, True))

    def variables(key):
        tokens = jnp.zeros((1, 8), jnp.int32)
        batch = {"tokens": tokens, "mask": tokens == 0} if sample is None else sample
        return module.init(key, batch, method=forward)

    given = variables(jax.random.key(0)) if params is None else params
    given = flax.core.unfreeze(given)
    if "params" not in given:
        given = {"params": given}
    constants = {name: value for name, value in given.items() if name != "params"}

    def run(params, batch, key):
        rngs = None if key is None else {"dropout": key}
        return module.apply(
            {"params": params} | constants,
            batch,
            key is None,
            method=run_bound,
            rngs=rngs,
        )

    def head(params, x):
        return module.apply({"params": params} | constants, x, method=head_bound)

    def init(key):
        return flax.core.unfreeze(variables(key))["params"]

    return _model("from_linen", init, run, head), given["params"]


def _model(owner: str, init: Callable, run: Callable, head: Callable) -> Model:
    """A Model without sites around run(params, batch, key) and head(params, hidden)."""

    def apply(
        params: Params,
        batch: Batch,
        *,
        taps: Mapping | None = None,
        edits: Mapping | None = None,
        until: int | None = None,
        key: PRNGKey | None = None,
    ) -> Outputs:
        if taps or edits or until is not None:
            raise ValueError(
                f"A model made by {owner} has no named sites, so it takes no taps, "
                "edits or until. Use models.make, or read it inside the module."
            )
        return Outputs(run(params, batch, key), {})

    def unembed(params: Params, hidden: Array) -> Array:
        return head(params, hidden).astype(jnp.float32)

    return Model(init, apply, unembed, {})


def _both(owner: str, hidden: Any, unembed: Any) -> None:
    if (hidden is None) != (unembed is None):
        missing = "hidden" if hidden is None else "unembed"
        raise ValueError(
            f"{owner} needs both hidden and unembed, or neither, got no {missing}."
        )


def _call(function: Callable, tokens: Array, deterministic: bool) -> Array:
    """function(tokens), with `deterministic` if it has that parameter."""
    called = function if inspect.isroutine(function) else type(function).__call__
    if "deterministic" in inspect.signature(called).parameters:
        return function(tokens, deterministic=deterministic)
    return function(tokens)


def _variables(tree: PyTree) -> PyTree:
    """The same nested dict, of nnx.Param."""
    if isinstance(tree, Mapping):
        return nnx.Dict({name: _variables(value) for name, value in tree.items()})
    return nnx.Param(tree)


def _plain(state: PyTree) -> Params:
    """An NNX state as a nested dict of arrays with string keys."""
    flat = {path: variable.get_value() for path, variable in nnx.to_flat_state(state)}
    return _nested({tuple(map(str, path)): value for path, value in flat.items()})


def _nested(flat: Mapping[tuple, Any]) -> dict:
    tree: dict = {}
    for (*parents, last), value in flat.items():
        node = tree
        for key in parents:
            node = node.setdefault(key, {})
        node[last] = value
    return tree


def _at(params: Params, path: tuple) -> Array:
    for key in path:
        params = params[str(key)]
    return params
