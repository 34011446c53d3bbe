# SPDX-License-Identifier: Apache-2.0
"""Runs a golden case through jaxunlearn: its manifest entry and inputs to outputs.

Hyperparameters come from the entry, sizes from the arrays. To cover more cases, write a
function in `golden_families/` and add a row to FAMILIES.
"""

import functools
import re
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

# The families lie beside this file, however and from wherever it was loaded.
sys.path.insert(0, str(Path(__file__).resolve().parent))

from golden_families import (  # noqa: E402
    constrained,
    directions,
    edited,
    hidden,
    likelihood,
    muse,
    preference,
    tokens,
)

Case = Mapping[str, Any]
Family = Callable[[Case, Mapping[str, jax.Array]], Mapping[str, jax.Array]]

# The first pattern that matches a case's whole name decides.
FAMILIES: dict[str, Family] = {
    r"batch_nll.*": likelihood.batch_nll,
    r"kl_retain.*": likelihood.kl_retain,
    r"grad_ascent.*|grad_diff.*": likelihood.grad_diff,
    r"npo.*": preference.npo,
    r"simnpo.*": preference.simnpo,
    r"dpo.*": preference.dpo,
    r"wga.*|satimp.*": tokens.weighted,
    r"undial.*": tokens.undial,
    r"ceu.*": tokens.ce_u,
    r"pdu.*": constrained.pdu,
    r"rmu_activation_loss.*": hidden.activation,
    r"rmu.*": hidden.rmu,
    r"muse_(ga|npo)(_.*)?": muse.loss,
    r"blur_muse_loss.*": muse.two_losses,
    r"muse_task_vector.*": edited.task_vector,
    r"tofu_(grad.*|kl)": likelihood.tofu,
    r"blur_muse_.*": directions.muse,
    r"blur_tofu.*": directions.tofu,
    r"blur_wmdp.*": directions.wmdp,
}


def covered(name: str) -> bool:
    """Whether a family knows the case."""
    return any(re.fullmatch(pattern, name) for pattern in FAMILIES)


def run_case(case: Case, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The outputs of a case as jaxunlearn computes them, by role.

    Args:
        case: an entry of the manifest's `cases`.
        inputs: role -> array. Float64 arrays are computed with in float64.
    Returns:
        role -> array, the roles of the entry's `outputs`.
    Raises:
        NotImplementedError: if no family covers the case.
        KeyError: if the family does not give an output that the entry asks for.
    """
    name = case["name"]
    families = (f for pattern, f in FAMILIES.items() if re.fullmatch(pattern, name))
    family = next(families, None)
    if family is None:
        raise NotImplementedError(
            f"No family of golden cases covers {name!r}; there are {list(FAMILIES)}. "
            "Write one in tests/golden/golden_families and add it to FAMILIES."
        )
    wide = any(np.asarray(x).dtype == np.float64 for x in inputs.values())
    with jax.enable_x64(wide):
        arrays = {role: jax.numpy.asarray(x) for role, x in inputs.items()}
        outputs = jax.jit(functools.partial(family, case))(arrays)
        outputs = {role: np.asarray(x) for role, x in outputs.items()}
    missing = sorted(set(case["outputs"]) - set(outputs))
    if missing:
        raise KeyError(f"The family of {name!r} does not give {missing}.")
    return {role: outputs[role] for role in case["outputs"]}
