# SPDX-License-Identifier: Apache-2.0
"""Recipes by their dotted names."""

import inspect
from collections.abc import Callable

from jaxunlearn import _checks
from jaxunlearn.recipes._recipe import Recipe


def by_name(
    name: str | None = None,
) -> dict[str, Callable[..., Recipe]] | Callable[..., Recipe]:
    """A recipe by its dotted name, or all of them.

    Args:
        name: such as "blur.npo"; None for all.
    Returns:
        The function that makes the recipe, (model, *, settings...) -> Recipe; or a dict
        of name -> function. `condensation` is not in it: it trains in stages.
    Raises:
        ValueError: if there is no recipe of this name; the message names the nearest.
    """
    from jaxunlearn import recipes  # here, as that module imports this one

    public = [x for name, x in vars(recipes).items() if not name.startswith("_")]
    modules = [x for x in public if inspect.ismodule(x)]
    found = {
        f"{module.__name__.split('.')[-1]}.{label}": value
        for module in modules
        for label, value in vars(module).items()
        if inspect.isfunction(value) and value.__module__ == module.__name__
        if not label.startswith("_")
        if inspect.signature(value).return_annotation is Recipe
    }
    if name is None:
        return found
    _checks.one_of("recipes.by_name", sorted(found), name=name)
    return found[name]
