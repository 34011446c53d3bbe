# SPDX-License-Identifier: Apache-2.0
"""Ordered rules of placement: matching, and rules made from others; public in
`sharding`."""

import re
from collections.abc import Sequence

from jaxunlearn import _checks, trees
from jaxunlearn.typing import PyTree, Rules


def axes_of(path: str, rules: Rules) -> tuple:
    """The axes of the first rule that matches a leaf's path; see `by_rules`."""
    for rule, axes in rules:
        if matches(rule, path):
            return tuple(axes)
    raise ValueError(
        f"by_rules needs a rule for every leaf, got none for {path!r}. Add one, such "
        "as (r'.*', ()) at the end, which puts a full copy on every device."
    )


def override(rules: Rules, first: Rules, tree: PyTree) -> Rules:
    """`rules` with other rules before them, each of which must match a leaf.

    Args:
        rules: the model's.
        first: ordered (pattern, axes), as for `by_rules`.
        tree: the params, or their shapes.
    Returns:
        Rules for `by_rules`, `create` and `jit_step`.
    Raises:
        ValueError: if a pattern of `first` matches no leaf.
    """
    paths = list(trees.paths(tree))
    for rule, _ in first:
        if not any(matches(rule, path) for path in paths):
            raise ValueError(
                f"override needs rules that match a leaf, got {rule!r}, which matches "
                f"none of {_checks.listed(paths)}. A pattern must match a full path "
                "or all of it after some slash."
            )
    return (*first, *rules)


def zero(rules: Rules, axes: Sequence[str] = ("data", "fsdp")) -> Rules:
    """Rules that split the optimizer's state over data axes and copy the params.

    This is the first stage of ZeRO: every device has all params (up to `tensor` and
    `expert`, which the model's rules keep), so that no layer gathers kernels, but holds
    and updates only its part of the moments; the updated params are gathered once a
    step. Compared with the model's rules it needs more memory for params and gradients
    and less communication.

    Args:
        rules: the model's, in which the axis `fsdp` splits params.
        axes: what splits the moments in its place; their product must divide every
            dimension that `fsdp` splits.
    Returns:
        Rules for `by_rules`, `create` and `jit_step` of an UnlearnState.
    References: https://arxiv.org/abs/1910.02054
    """

    def with_fsdp_as(entries, new):
        found = []
        for entry in entries:
            split = [new if n == "fsdp" else (n,) for n in names_of(entry)]
            flat = tuple(name for group in split for name in group)
            found.append(flat or None)
        return tuple(found)

    moments = tuple(
        (rf"opt_state/(?:.*/)?(?:{rule})", with_fsdp_as(entries, tuple(axes)))
        for rule, entries in rules
    )
    copies = tuple((rule, with_fsdp_as(entries, ())) for rule, entries in rules)
    return (*moments, *copies)


def matches(rule: str, path: str) -> bool:
    """Whether a rule's pattern matches a path, or all of it after some slash."""
    path = path.split(f"/{trees.LAYERS}")[0]  # layers are placed as their leaf is
    return re.fullmatch(f"(?:.*/)?(?:{rule})", path) is not None


def names_of(axis: str | Sequence[str] | None) -> tuple[str, ...]:
    """The names in one entry of a rule."""
    return (axis,) if isinstance(axis, str) else tuple(axis or ())
