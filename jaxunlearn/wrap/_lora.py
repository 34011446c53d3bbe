# SPDX-License-Identifier: Apache-2.0
"""LoRA: training a low-rank product beside each of some kernels, and not the kernels.

A kernel W [in, out] becomes W + (alpha / rank) A B with A [in, rank] and B [rank, out],
Section 4.1 of Hu et al. 2021 (whose W, A and B are the transposes). The two lie beside
their kernel as `lora_a` and `lora_b`; params without them are the model they began as,
so that the reference of a term costs nothing but the base.

    low = wrap.lora(model, pattern=r"blocks/attention/[qv]/kernel", rank=8, alpha=16.0)
    params = wrap.add_lora(params, low, key)
    train, rest = trees.split(params, wrap.LORA)
    ...
    hf.save(model, wrap.merge_lora(trees.merge(state.params, rest), low), "unlearned/")

References: https://arxiv.org/abs/2106.09685
"""

import dataclasses
import math
import re
from collections.abc import Callable

import jax
import jax.numpy as jnp

from jaxunlearn import _checks, sharding, trees
from jaxunlearn.typing import Array, Batch, Model, Outputs, Params, PRNGKey

LORA = r".*/lora_[ab]"


@dataclasses.dataclass(frozen=True)
class _Lora:
    """The wrapped model's `apply`, which carries the settings; hashable."""

    model: Model
    pattern: str
    rank: int
    alpha: float

    def __call__(self, params: Params, batch: Batch, **kwargs) -> Outputs:
        return self.model.apply(self.read(params), batch, **kwargs)

    def read(self, params: Params) -> Params:
        """The params as the model inside reads them."""
        if not self.model.low_rank:
            return _merged(params, self.scale)
        return trees.map_with_path(
            lambda p, x: x * self.scale if p.endswith("/lora_b") else x, params
        )

    @property
    def scale(self) -> float:
        return self.alpha / self.rank


@dataclasses.dataclass(frozen=True)
class _Reading:
    """Another of the model's functions, (params, ...) -> anything, on read params."""

    lora: _Lora
    function: Callable

    def __call__(self, params: Params, *args, **kwargs):
        return self.function(self.lora.read(params), *args, **kwargs)


def lora(model: Model, *, pattern: str, rank: int = 8, alpha: float = 16.0) -> Model:
    """The model with a low-rank product added to each kernel that `pattern` matches.

    With the decoder each block computes (x A) B beside x W: neither a product A B nor a
    gradient of W's size is ever made. A model from Flax runs on merged kernels instead,
    W + (alpha / rank) A B made again in every call, whose gradients take a
    kernel's memory for a moment; optimizer state is as small.

    Args:
        model: with an `init` that makes its params, as the shapes come from there.
        pattern: regular expression matched against whole leaf paths; kernels only.
        rank: of the products, >= 1 and below the sides of every kernel.
        alpha: the products count alpha / rank times, > 0.
    Returns:
        A Model whose `init` adds the leaves too and whose `rules` cut A as its kernel's
        input axis and B as its output axis. Its `config` is the model's.
    Raises:
        ValueError: if the pattern matches no leaf or one that is no kernel (an
            embedding, and so a tied unembedding, a bias, a norm, a convolution), the
            rank does not fit, or the model has such leaves already.
    """
    _checks.positive_int("wrap.lora", rank=rank)
    _checks.positive("wrap.lora", alpha=alpha)
    if isinstance(model.apply, _Lora):
        raise ValueError(
            "wrap.lora needs a model without LoRA, got one that has it. Wrap the model "
            "inside with one pattern for all kernels."
        )
    apply = _Lora(model, pattern, rank, float(alpha))
    kernels = _kernels(jax.eval_shape(model.init, jax.random.key(0)), apply)

    def init(key: PRNGKey) -> Params:
        base, fresh = jax.random.split(key)
        return _add(model.init(base), apply, fresh)

    extend = model.decode and _Reading(apply, model.decode)
    return model._replace(
        init=init,
        apply=apply,
        unembed=_Reading(apply, model.unembed),
        decode=extend,
        rules=(*_rules(kernels, model), *model.rules),
    )


def add_lora(params: Params, model: Model, key: PRNGKey) -> Params:
    """Params with fresh leaves, which change nothing yet: A random, B zero.

    Args:
        params: of the model before wrapping. Its leaves are not copied.
        model: from `lora`.
        key: A is drawn from N(0, 1 / in), so that x A is as large as x; float32, as B.
    Returns:
        The params with `lora_a` [..., in, rank] and `lora_b` [..., rank, out] beside
        each matching kernel.
    Raises:
        ValueError: if the model is not from `lora`, or the params do not have what its
            pattern asks for.
    Paper and code: the paper draws A from a Gaussian of no stated width; its code
        from a uniform distribution of variance 1 / (3 in).
    """
    return _add(params, _settings("wrap.add_lora", model), key)


def merge_lora(params: Params, model: Model) -> Params:
    """Plain params for the model before wrapping: W + (alpha / rank) A B, A and B gone.

    Args:
        params: with their low-rank leaves, such as trees.merge gives.
        model: from `lora`, whose alpha and rank count.
    Returns:
        Params like those that `add_lora` was given, in the kernels' dtypes.
    Raises:
        ValueError: if the model is not from `lora`, or the params have no such leaves.
    """
    settings = _settings("wrap.merge_lora", model)
    if not any(re.fullmatch(LORA, path) for path in trees.paths(params)):
        raise ValueError(
            "wrap.merge_lora needs params with lora_a and lora_b, got none. Merge the "
            "halves of a split first: trees.merge(state.params, rest)."
        )
    return _merged(params, settings.scale)


def _merged(params: Params, scale: float) -> Params:
    if "lora_a" in params:
        rest = {k: x for k, x in params.items() if not k.startswith("lora_")}
        highest = jax.lax.Precision.HIGHEST
        delta = jnp.matmul(params["lora_a"], params["lora_b"], precision=highest)
        kernel = params["kernel"]
        whole = kernel.astype(jnp.float32) + scale * delta.astype(jnp.float32)
        return rest | {"kernel": whole.astype(kernel.dtype)}
    return {
        k: _merged(x, scale) if isinstance(x, dict) else x for k, x in params.items()
    }


def _settings(owner: str, model: Model) -> _Lora:
    if not isinstance(model.apply, _Lora):
        raise ValueError(
            f"{owner} needs the model that wrap.lora returned, got one without LoRA."
        )
    return model.apply


def _kernels(params: Params, settings: _Lora) -> dict[str, Array]:
    """The kernels that the pattern matches, by path; raises where it should not."""
    leaves, pattern = trees.paths(params), settings.pattern
    if any(re.fullmatch(LORA, path) for path in leaves):
        raise ValueError(
            "wrap.lora needs params without low-rank leaves, got some. Merge them with "
            "wrap.merge_lora first."
        )
    found = {p: x for p, x in leaves.items() if re.fullmatch(pattern, p)}
    kernels = [p for p in leaves if p.endswith("/kernel")]
    if not found:
        raise ValueError(
            f"wrap.lora needs a pattern that matches a kernel, got {pattern!r}; the "
            f"kernels are {_checks.listed(kernels)}."
        )
    others = [path for path in found if path not in kernels]
    if others:
        raise ValueError(
            f"wrap.lora needs a pattern that matches kernels only, got {pattern!r}, "
            f"which matches {_checks.listed(others)}; the kernels are "
            f"{_checks.listed(kernels)}."
        )
    for path, x in found.items():
        # Only the decoder stacks its layers; elsewhere three axes may mean anything.
        if len(x.shape) != 2 and not (settings.model.low_rank and len(x.shape) == 3):
            raise ValueError(
                f"wrap.lora needs kernels of shape [in, out], got {x.shape} at "
                f"{path!r}. Leave it out of the pattern."
            )
        if settings.rank >= min(x.shape[-2:]):
            raise ValueError(
                f"wrap.lora needs a rank below the sides of every kernel, got "
                f"rank={settings.rank} and {x.shape} at {path!r}."
            )
    return found


def _add(params: Params, settings: _Lora, key: PRNGKey) -> Params:
    kernels = _kernels(params, settings)
    keys = dict(zip(kernels, jax.random.split(key, len(kernels)), strict=True))

    def walk(node, path):
        if not isinstance(node, dict):
            return node
        new = {key: walk(value, f"{path}{key}/") for key, value in node.items()}
        kernel = kernels.get(f"{path}kernel")
        if kernel is None:
            return new
        *stack, into, out = kernel.shape
        a = jax.random.normal(
            keys[f"{path}kernel"], (*stack, into, settings.rank), jnp.float32
        )
        b = jnp.zeros((*stack, settings.rank, out), jnp.float32)
        return new | {"lora_a": a / math.sqrt(into), "lora_b": b}

    return walk(params, "")


def _rules(kernels: dict[str, Array], model: Model):
    """A is cut as its kernel's input axis, B as its output axis."""
    for path, kernel in kernels.items():
        axes = sharding.axes_of(path, model.rules)
        axes = (*axes, *(None,) * (len(kernel.shape) - len(axes)))
        place = re.escape(path.removesuffix("kernel"))
        yield f"{place}lora_a", (*axes[:-1], None)
        yield f"{place}lora_b", (*axes[:-2], None, axes[-1])
