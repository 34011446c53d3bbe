# SPDX-License-Identifier: Apache-2.0
"""The mesh of devices; public as sharding.make_mesh, auto_axes and on_mesh."""

import contextlib
import math
from collections.abc import Mapping, Sequence

import jax
from jax.experimental import mesh_utils
from jax.sharding import AbstractMesh, AxisType, Mesh

# From the outermost to the innermost, which has the most communication.
AXES = ("data", "fsdp", "expert", "context", "tensor")


def make_mesh(
    *,
    data: int = 1,
    fsdp: int = -1,
    expert: int = 1,
    context: int = 1,
    tensor: int = 1,
    devices: Sequence[jax.Device] | None = None,
) -> Mesh:
    """A mesh with the axes data, fsdp, expert, context and tensor.

    Args:
        data: number of replicas of the model, each with its share of the rows. Where
            the devices form several slices (connected only by the data-centre network),
            it must be a multiple of their number, as only this axis crosses slices.
        fsdp: number of parts of params, optimizer state and rows.
        expert: number of parts of the experts of a mixture, in addition to those of
            `tensor`, which also splits experts. It splits rows as fsdp does; each part
            computes its experts on the gathered rows of all parts.
        context: number of parts of every sequence, for sequences too long for one
            device. Each part computes its queries against all keys and values, which
            are gathered in every layer.
        tensor: number of parts of heads, hidden units and the vocabulary.
        devices: all devices of all hosts if None.
    Returns:
        A Mesh whose axes are Auto: the compiler places what has no constraint.
    Raises:
        ValueError: if the sizes do not multiply to the number of devices, more than one
            is -1, or the slices do not divide `data`.
    """
    devices = list(jax.devices() if devices is None else devices)
    sizes = (data, fsdp, expert, context, tensor)
    sizes = _sizes(dict(zip(AXES, sizes, strict=True)), len(devices))
    slices = {getattr(device, "slice_index", 0) for device in devices}
    shape = tuple(sizes.values())
    if len(slices) > 1:
        if sizes["data"] % len(slices):
            raise ValueError(
                f"make_mesh needs data to be a multiple of the {len(slices)} slices, "
                f"got data={sizes['data']}. Only that axis may cross slices."
            )
        inner = (sizes["data"] // len(slices), *shape[1:])
        grid = mesh_utils.create_hybrid_device_mesh(
            inner, (len(slices), *(1,) * len(shape[1:])), devices=devices
        )
    else:
        # Splits a physical axis only if no product of complete axes has the size.
        grid = mesh_utils.create_device_mesh(
            shape, devices=devices, allow_split_physical_axes=True
        )
    return Mesh(grid, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def auto_axes(mesh: Mesh) -> Mesh:
    """The same mesh with Auto axes: the compiler places what has no constraint.

    The models here are written for Auto axes. jax.device_put of an array onto the same
    shards of this mesh copies nothing.
    """
    if all(kind == AxisType.Auto for kind in mesh.axis_types):
        return mesh
    kinds = (AxisType.Auto,) * len(mesh.axis_names)
    return Mesh(mesh.devices, mesh.axis_names, axis_types=kinds)


def explicit_axes(mesh: Mesh | AbstractMesh) -> list[str]:
    """The names of the Explicit axes."""
    kinds = zip(mesh.axis_names, mesh.axis_types, strict=True)
    return [name for name, kind in kinds if kind == AxisType.Explicit]


def _sizes(sizes: Mapping[str, int], count: int) -> dict[str, int]:
    given = ", ".join(f"{name}={size}" for name, size in sizes.items())
    free = [name for name, size in sizes.items() if size == -1]
    product = math.prod(size for size in sizes.values() if size != -1)
    if len(free) > 1 or any(size < 1 and size != -1 for size in sizes.values()):
        raise ValueError(
            f"make_mesh needs sizes of 1 or more, one of which may be -1, got {given}."
        )
    fits = count % product == 0 if free else count == product
    if not fits:
        raise ValueError(
            f"make_mesh needs sizes whose product is the number of devices, {count}, "
            f"got {given}. Set one of them to -1 to use all devices."
        )
    return {name: count // product if name in free else n for name, n in sizes.items()}


def on_mesh(mesh: Mesh | None) -> contextlib.AbstractContextManager:
    """A context in which `mesh` is set, with Auto axes; None changes nothing."""
    if mesh is None:
        return contextlib.nullcontext()
    return jax.set_mesh(auto_axes(mesh))
