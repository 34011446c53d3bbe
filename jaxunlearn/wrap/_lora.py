# SPDX-License-Identifier: Apache-2.0
"""LoRA: training a low-rank product added to chosen kernels, with the kernels frozen.

A kernel W [in, out] becomes W + (alpha / rank) A B with A [in, rank] and B [rank, out],
Section 4.1 of Hu et al. 2021 (whose W, A and B are the transposes). A and B are leaves
`lora_a` and `lora_b` next to their kernel. Params without them give the original model,
so that the reference of a term needs no memory besides the base.

    low = wrap.lora(model, pattern=r"blocks/attention/[qv]/kernel", rank=8, alpha=16.0)
    params = wrap.add_lora(low, params, key)
    step, state, frozen = recipe.setup(low, params)     # trains LoRA leaves alone
    ...
    params = trees.merge(state.params, frozen.params)
    hf.save(model, wrap.merge_lora(low, params), "unlearned/")

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
        """The params as the wrapped model reads them."""
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
    """Another function of the model, (params, ...) -> anything, after `read`."""

    lora: _Lora
    function: Callable

    def __call__(self, params: Params, *args, **kwargs):
        return self.function(self.lora.read(params), *args, **kwargs)


def lora(model: Model, *, pattern: str, rank: int = 8, alpha: float = 16.0) -> Model:
    """The model with a low-rank product added to each kernel that `pattern` matches.

    In the decoder each block computes (x A) B and adds it to x W: neither a product A B
    nor a gradient of W's size ever exists. A model from Flax runs on merged kernels W +
    (alpha / rank) A B, computed in every call, whose gradients temporarily need a
    kernel's memory; optimizer state is equally small.

    Args:
        model: with an `init` that makes its params, which gives the shapes.
        pattern: regular expression matched against full leaf paths; kernels only.
        rank: of the products, >= 1 and below both sides of every kernel.
        alpha: the products are multiplied by alpha / rank, > 0.
    Returns:
        A Model whose `init` also makes the new leaves and whose `rules` split A like
        its kernel's input axis and B like its output axis. Its `config` is the model's.
    Raises:
        ValueError: if the pattern matches no leaf or a leaf that is not a kernel (an
            embedding, and so a tied unembedding, a bias, a norm, a convolution), the
            rank does not fit, or the model already has such leaves.
    """
    _checks.positive_int("wrap.lora", rank=rank)
    _checks.positive("wrap.lora", alpha=alpha)
    if isinstance(model.apply, _Lora):
        raise ValueError(
            "wrap.lora needs a model without LoRA, got one with it. Wrap the original "
            "model with one pattern for all kernels."
        )
    apply = _Lora(model, pattern, rank, float(alpha))
    kernels = _kernels(jax.eval_shape(model.init, jax.random.key(0)), apply)

    def init(key: PRNGKey) -> Params:
        base, fresh = jax.random.split(key)
        return _add(model.init(base), apply, fresh)

    decode = model.decode and _Reading(apply, model.decode)
    return model._replace(
        init=init,
        apply=apply,
        unembed=_Reading(apply, model.unembed),
        decode=decode,
        target_logps=model.target_logps and _Reading(apply, model.target_logps),
        rules=(*_rules(kernels, model), *model.rules),
        packs=apply if model.packs is model.apply else None,
    )


def add_lora(model: Model, params: Params, key: PRNGKey) -> Params:
    """Params with new leaves, A random and B zero, so that the outputs are the same.

    Args:
        model: from `lora`.
        params: of the model before wrapping. Its leaves are not copied.
        key: for A, drawn from N(0, 1 / in), so that x A is as large as x. A and B are
            float32.
    Returns:
        The params with `lora_a` [..., in, rank] and `lora_b` [..., rank, out] next to
        each matching kernel.
    Raises:
        ValueError: if the model is not from `lora`, or the params lack the kernels that
            its pattern matched.
    Paper and code: the paper draws A from a Gaussian and states no variance; its code
        draws from a uniform distribution of variance 1 / (3 in).
    """
    return _add(params, _settings("wrap.add_lora", model), key)


def merge_lora(model: Model, params: Params) -> Params:
    """Plain params for the model before wrapping: W + (alpha / rank) A B.

    Args:
        model: from `lora`, which gives alpha and rank.
        params: with their low-rank leaves, such as trees.merge gives.
    Returns:
        Params with the leaves that `add_lora` was given, in the kernels' dtypes.
    Raises:
        ValueError: if the model is not from `lora`, or the params have no such leaves.
    """
    settings = _settings("wrap.merge_lora", model)
    if not any(re.fullmatch(LORA, path) for path in trees.paths(params)):
        raise ValueError(
            "wrap.merge_lora needs params with lora_a and lora_b, got none. Merge the "
            "halves of a split first: trees.merge(state.params, frozen.params)."
        )
    return _merged(params, settings.scale)


def _merged(params: Params, scale: float) -> Params:
    if "lora_a" in params:
        rest = {k: x for k, x in params.items() if not k.startswith("lora_")}
        highest = jax.lax.Precision.HIGHEST
        delta = jnp.matmul(params["lora_a"], params["lora_b"], precision=highest)
        kernel = params["kernel"]
        merged = kernel.astype(jnp.float32) + scale * delta.astype(jnp.float32)
        return rest | {"kernel": merged.astype(kernel.dtype)}
    return {
        k: _merged(x, scale) if isinstance(x, dict) else x for k, x in params.items()
    }


def _settings(owner: str, model: Model) -> _Lora:
    if not isinstance(getattr(model, "apply", None), _Lora):
        raise ValueError(
            f"{owner} needs (model, params) with a model from wrap.lora, got a "
            f"{type(model).__name__} without LoRA."
        )
    return model.apply


def _kernels(params: Params, settings: _Lora) -> dict[str, Array]:
    """The kernels that the pattern matches, by path; raises for other leaves."""
    leaves, pattern = trees.paths(params), settings.pattern
    if any(re.fullmatch(LORA, path) for path in leaves):
        raise ValueError(
            "wrap.lora needs params without low-rank leaves, got params with them. "
            "Merge them with wrap.merge_lora first."
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
        # Only the decoder stacks layers, and experts after them, on the first axes.
        if len(x.shape) not in ((2, 3, 4) if settings.model.low_rank else (2,)):
            raise ValueError(
                f"wrap.lora needs kernels of shape [in, out], got {x.shape} at "
                f"{path!r}. Leave it out of the pattern."
            )
        if settings.rank >= min(x.shape[-2:]):
            raise ValueError(
                f"wrap.lora needs a rank below both sides of every kernel, got "
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
    """Rules that split A like its kernel's input axis and B like its output axis."""
    for path, kernel in kernels.items():
        axes = sharding.axes_of(path, model.rules)
        axes = (*axes, *(None,) * (len(kernel.shape) - len(axes)))
        place = re.escape(path.removesuffix("kernel"))
        yield f"{place}lora_a", (*axes[:-1], None)
        yield f"{place}lora_b", (*axes[:-2], None, axes[-1])
