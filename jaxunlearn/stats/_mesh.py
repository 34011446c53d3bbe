# SPDX-License-Identifier: Apache-2.0
"""The mesh on which statistics are computed."""

import contextlib

import jax
from jax.sharding import Mesh

from jaxunlearn import sharding


def on(mesh: Mesh | None):
    """A context in which `mesh` is set; without a mesh nothing changes."""
    if mesh is None:
        return contextlib.nullcontext()
    return jax.set_mesh(sharding.auto_axes(mesh))
