# SPDX-License-Identifier: Apache-2.0
"""One tiny model with hidden facts for all attacks."""

import jax
import pytest

from tests.attacks import towns


@pytest.fixture(autouse=True, scope="session")
def promotion():
    with jax.numpy_dtype_promotion("standard"):  # optax.adamw needs it
        yield


@pytest.fixture(scope="session")
def world(promotion):
    return towns.world()
