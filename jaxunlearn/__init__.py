# SPDX-License-Identifier: Apache-2.0
"""Machine unlearning in JAX: losses, gradient combiners, one jitted step, and attacks.

Importing this package imports jax, flax and optax and nothing heavier. File formats
live in `jaxunlearn.io`, data in `jaxunlearn.data`, networks in `jaxunlearn.models`.
"""

from jaxunlearn import attacks as attacks
from jaxunlearn import bilevel as bilevel
from jaxunlearn import combine as combine
from jaxunlearn import edits as edits
from jaxunlearn import evaluate as evaluate
from jaxunlearn import losses as losses
from jaxunlearn import metrics as metrics
from jaxunlearn import recipes as recipes
from jaxunlearn import sharding as sharding
from jaxunlearn import stats as stats
from jaxunlearn import terms as terms
from jaxunlearn import trees as trees
from jaxunlearn import wrap as wrap
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

__version__ = "0.2.0"
