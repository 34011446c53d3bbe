# SPDX-License-Identifier: Apache-2.0
"""Machine unlearning in JAX: losses, gradient combiners, one jitted step, and attacks.

    import jaxunlearn as ju

    ju.recipes.blur.npo, ju.terms.on_logps, ju.term_gradients, ju.fit

Importing this package imports jax, flax and optax and nothing heavier. A namespace such
as `ju.attacks` or `ju.data` is imported when it is first used.
"""

import importlib
from typing import TYPE_CHECKING, Any

from jaxunlearn._fit import NotFinite as NotFinite
from jaxunlearn._fit import fit as fit
from jaxunlearn._fit import fit_stages as fit_stages
from jaxunlearn._generate import generate as generate
from jaxunlearn._step import UnlearnState as UnlearnState
from jaxunlearn._step import init_state as init_state
from jaxunlearn._step import make_step as make_step
from jaxunlearn._step import term_gradients as term_gradients
from jaxunlearn.typing import Frozen as Frozen
from jaxunlearn.typing import Model as Model
from jaxunlearn.typing import Outputs as Outputs

if TYPE_CHECKING:
    from jaxunlearn import attacks as attacks
    from jaxunlearn import bilevel as bilevel
    from jaxunlearn import combine as combine
    from jaxunlearn import data as data
    from jaxunlearn import edits as edits
    from jaxunlearn import evaluate as evaluate
    from jaxunlearn import io as io
    from jaxunlearn import losses as losses
    from jaxunlearn import metrics as metrics
    from jaxunlearn import models as models
    from jaxunlearn import plan as plan
    from jaxunlearn import recipes as recipes
    from jaxunlearn import sharding as sharding
    from jaxunlearn import stats as stats
    from jaxunlearn import synth as synth
    from jaxunlearn import terms as terms
    from jaxunlearn import trees as trees
    from jaxunlearn import typing as typing
    from jaxunlearn import wrap as wrap

__version__ = "0.2.0"

_NAMESPACES = frozenset(
    "attacks bilevel combine data edits evaluate io losses metrics models plan recipes "
    "sharding stats synth terms trees typing wrap".split()
)


def __getattr__(name: str) -> Any:
    if name in _NAMESPACES:
        return importlib.import_module(f"jaxunlearn.{name}")
    raise AttributeError(f"module 'jaxunlearn' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(_NAMESPACES | globals().keys())
