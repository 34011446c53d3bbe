# SPDX-License-Identifier: Apache-2.0
"""Meshes, and ordered rules that say how each leaf lies on one.

A rule is (pattern, axes): leaf paths that the regular expression matches are cut as
`axes` says, one entry a dimension, each None, a mesh axis or several. The first rule
that matches decides. Models bring theirs as `model.rules`; put your own before them.

    mesh = sharding.make_mesh(fsdp=4, tensor=2)
    params = sharding.create(model.init, mesh, model.rules, key)
    state = sharding.create(
        partial(ju.init_state, tx=tx), mesh, model.rules, params, key=key)
    step = sharding.jit_step(ju.make_step(parts, tx), mesh, model.rules, state)

Patterns are matched against the end of a path too, so that the same rules serve the
parameters, their gradients and the moments that an optimizer keeps of them.
"""

import math
import re
from collections.abc import Callable, Mapping, Sequence
from functools import partial

import jax
import jax.numpy as jnp
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from jaxunlearn import _checks, trees
from jaxunlearn._hosts import initialize as initialize
from jaxunlearn.typing import Array, PyTree, Rules

AXES = ("data", "fsdp", "context", "tensor")  # the busiest innermost
BATCH = ("data", "fsdp")  # the axes over which the rows of a batch are cut
ROWS = (BATCH, "context")  # how rows of tokens, [B, L, ...], are cut


def make_mesh(
    *,
    data: int = 1,
    fsdp: int = -1,
    context: int = 1,
    tensor: int = 1,
    devices: Sequence[jax.Device] | None = None,
) -> Mesh:
    """A mesh with the axes data, fsdp, context and tensor.

    Args:
        data: replicas of the model, each with its share of the rows. Where the devices
            form several slices (joined by the data-centre network only), it must be a
            multiple of their number: nothing but this axis crosses slices.
        fsdp: parts into which params and optimizer state are cut; rows are cut too.
        context: parts into which every sequence is cut, for sequences too long for one
            device. Each part computes its own queries against all keys and values,
            which are gathered in every layer.
        tensor: parts into which heads, hidden units and the vocabulary are cut.
        devices: all devices of all hosts if None.
    Returns:
        A Mesh whose axes are Auto: the compiler places what is not constrained.
    Raises:
        ValueError: if the sizes do not multiply to the number of devices, more than one
            is -1, or the slices do not divide `data`.
    """
    devices = list(jax.devices() if devices is None else devices)
    sizes = _sizes(
        {"data": data, "fsdp": fsdp, "context": context, "tensor": tensor}, len(devices)
    )
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
            inner, (len(slices), 1, 1, 1), devices=devices
        )
    else:
        # Splits a physical axis only where no product of whole ones has a size.
        grid = mesh_utils.create_device_mesh(
            shape, devices=devices, allow_split_physical_axes=True
        )
    return Mesh(grid, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def by_rules(tree: PyTree, mesh: Mesh, rules: Rules) -> PyTree:
    """A NamedSharding for each leaf, by the first rule that matches its path.

    Args:
        tree: arrays or jax.ShapeDtypeStructs (jax.eval_shape gives them), such as
            params, a gradient tree or a whole UnlearnState. None stays None.
        mesh: where the leaves will lie.
        rules: ordered (pattern, axes). The pattern must match the whole path, or all
            of it from some slash on. Dimensions beyond `axes` are not cut; those of
            size 1 (of a mask, say), scalars and PRNG keys never are.
    Returns:
        A tree like `tree` of NamedShardings.
    Raises:
        ValueError: if no rule matches a leaf, a rule names an axis that the mesh lacks
            or has more entries than the leaf dimensions, or an axis does not divide its
            dimension.
    """

    def leaf(path, x):
        axes = axes_of(path, rules) if x.shape else ()
        _check(path, x.shape, axes, mesh)
        return NamedSharding(mesh, PartitionSpec(*_but_ones(x.shape, axes)))

    return trees.map_with_path(leaf, tree)


def axes_of(path: str, rules: Rules) -> tuple:
    """The axes of the first rule that matches a leaf's path; see `by_rules`."""
    for rule, axes in rules:
        if _matches(rule, path):
            return tuple(axes)
    raise ValueError(
        f"by_rules needs a rule for every leaf, got none for {path!r}. Add one, such "
        "as (r'.*', ()) at the end, which leaves what matches whole on every device."
    )


def override(rules: Rules, own: Rules, tree: PyTree) -> Rules:
    """`rules` with rules of your own before them, once each of those matches a leaf.

    Args:
        rules: the model's.
        own: ordered (pattern, axes), as for `by_rules`.
        tree: the params, or their shapes.
    Returns:
        Rules for `by_rules`, `create` and `jit_step`.
    Raises:
        ValueError: if a pattern of `own` matches no leaf.
    """
    paths = list(trees.paths(tree))
    for rule, _ in own:
        if not any(_matches(rule, path) for path in paths):
            raise ValueError(
                f"override needs rules that match a leaf, got {rule!r}, which matches "
                f"none of {_checks.listed(paths)}. A pattern must match a whole path, "
                "or all of it from some slash on."
            )
    return (*own, *rules)


def create(
    function: Callable[..., PyTree], mesh: Mesh, rules: Rules, *args, **kwargs
) -> PyTree:
    """function(*args, **kwargs), each leaf made in its shards and nowhere else.

    Args:
        function: pure, such as `model.init` or partial(init_state, tx=tx).
        mesh: where the result will lie.
        rules: as for `by_rules`, which says what it raises.
        *args, **kwargs: arrays or trees of them.
    """
    out = by_rules(jax.eval_shape(function, *args, **kwargs), mesh, rules)
    with jax.set_mesh(mesh):
        return jax.jit(function, out_shardings=out)(*args, **kwargs)


def put_rows(tree: PyTree, mesh: Mesh) -> PyTree:
    """Streams of batches onto the mesh, rows over data and fsdp, tokens over context.

    Args:
        tree: host arrays; the second of two dimensions is tokens. With several
            processes each gives its own share of the rows. A jax.ShapeDtypeStruct, of
            all rows, comes back with its sharding.
        mesh: where they go.
    Raises:
        ValueError: if the rows do not divide by data * fsdp, or tokens by context.
    """

    def leaf(path, x):
        if isinstance(getattr(x, "sharding", None), NamedSharding):
            return x  # on a mesh already
        if isinstance(x, jax.ShapeDtypeStruct):
            place = _rows(path, x.shape, mesh)
            return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place)
        processes = jax.process_count()
        place = _rows(path, (x.shape[0] * processes, *x.shape[1:]), mesh)
        if processes == 1:
            return jax.device_put(x, place)
        return jax.make_array_from_process_local_data(place, jax.device_get(x))

    return trees.map_with_path(leaf, tree)


def jit_step(
    step: Callable[..., tuple[PyTree, PyTree]], mesh: Mesh, rules: Rules, state: PyTree
) -> Callable[..., tuple[PyTree, PyTree]]:
    """The jitted step on a mesh: state donated and kept in its shards, rows cut.

    Args:
        step: from make_step; it is handed `rules` too.
        mesh: where the state lies, as `create` laid it.
        rules: the rules it was laid by.
        state: the state, or its shapes.
    Returns:
        A function like `step`, whose streams may come from the host, with `trace` and
        `lower` of a jitted function. Its Frozen should lie on the mesh already:
        jax.device_put(rest, by_rules(rest, mesh, rules)).
    """
    whole = NamedSharding(mesh, PartitionSpec())
    jitted = jax.jit(
        partial(step, rules=rules),
        donate_argnums=0,
        out_shardings=(by_rules(state, mesh, rules), whole),
    )

    def run(state, streams, frozen):
        with jax.set_mesh(mesh):
            return jitted(state, put_rows(streams, mesh), frozen)

    def trace(state, streams, frozen):
        with jax.set_mesh(mesh):
            return jitted.trace(state, put_rows(streams, mesh), frozen)

    def lower(state, streams, frozen):
        with jax.set_mesh(mesh):
            return jitted.lower(state, put_rows(streams, mesh), frozen)

    run.trace, run.lower = trace, lower
    return run


def constrain(x: Array, *axes: str | Sequence[str] | None) -> Array:
    """Keeps `x` cut as `axes` says inside jit; where no mesh is set, it is `x`.

    The mesh is that of the caller's `jax.set_mesh`. An axis that the mesh lacks or that
    does not divide its dimension is left out, as activations come in many shapes.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or all(mesh.shape[a] == 1 for a in mesh.axis_names):
        return x
    return jax.lax.with_sharding_constraint(x, spec(x.shape, *axes))


def spec(shape: Sequence[int], *axes: str | Sequence[str] | None) -> PartitionSpec:
    """`axes` without those that the caller's mesh lacks or that do not divide."""
    mesh = jax.sharding.get_abstract_mesh()
    kept = []
    for size, axis in zip(shape, axes, strict=False):
        names = [n for n in _names(axis) if n in mesh.shape]
        parts = math.prod(mesh.shape[n] for n in names)
        kept.append(tuple(names) if names and size % parts == 0 else None)
    return PartitionSpec(*kept)


def parts_of(axis: str) -> int:
    """How many parts the mesh of the caller's `jax.set_mesh` has on `axis`, or 1."""
    return dict(jax.sharding.get_abstract_mesh().shape).get(axis, 1)


def platform() -> str:
    """Of the caller's mesh, described or not, else of jax: "cpu", "gpu" or "tpu"."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.abstract_device is None:
        return jax.default_backend()
    return mesh.abstract_device.platform


def sums(
    function: Callable[..., Sequence[Array]],
    leaves: Mapping[str, Sequence[Array]],
    groups: Sequence[Sequence[int]],
    rules: Rules | None = None,
) -> Array:
    """Sums over all entries of all leaves of a group; on a mesh in one all-reduce.

    Left to the compiler, each way in which leaves are cut costs an all-reduce, one
    after the other. Here every device adds what it holds of all leaves, of a leaf that
    lies on several devices only the first of them, and one small array is reduced.
    Sums of whole numbers are exact.

    Args:
        function: (index of the leaf, *arrays) -> k scalars that add up over pieces of
            the arrays, such as (i, x) -> [jnp.sum(x * x)].
        leaves: path -> the arrays of one shape that `function` takes.
        groups: indices of the leaves of each sum.
        rules: how the leaves lie on the mesh of the caller's `jax.set_mesh`. If None,
            or where no mesh is set, the compiler places the sums.
    Returns:
        [groups, k].
    """
    columns = list(leaves.values())

    def add(columns, counts):
        parts = [function(i, *x) for i, x in enumerate(columns)]
        parts = [
            own
            if once is True
            else [jnp.where(once, x, jnp.zeros_like(x)) for x in own]
            for own, once in zip(parts, counts, strict=True)
        ]
        rows = [
            jnp.stack([sum(k[1:], start=k[0]) for k in zip(*own, strict=True)])
            for own in ([parts[i] for i in group] for group in groups)
        ]
        return jnp.stack(rows)

    mesh = jax.sharding.get_abstract_mesh()
    if rules is None or mesh.empty or mesh.size == 1:
        return add(columns, [True] * len(columns))
    axes = [
        _but_ones(x.shape, axes_of(path, rules) if x.shape else ())
        for path, (x, *_) in leaves.items()
    ]
    specs = [[PartitionSpec(*a)] * len(x) for a, x in zip(axes, columns, strict=True)]

    def first(cut):
        """Whether this device is the first of those that hold the same piece."""
        held = {name for axis in cut for name in _names(axis)}
        rest = [n for n in mesh.axis_names if n not in held and mesh.shape[n] > 1]
        return jax.lax.axis_index(rest) == 0 if rest else True

    return jax.shard_map(
        lambda own: jax.lax.psum(add(own, [first(a) for a in axes]), mesh.axis_names),
        in_specs=(specs,),
        out_specs=PartitionSpec(),
        check_vma=False,  # psum over all axes makes it the same everywhere
    )(columns)


def _rows(path: str, shape: tuple[int, ...], mesh: Mesh) -> NamedSharding:
    rows, parts = shape[0], math.prod(mesh.shape[axis] for axis in BATCH)
    if rows % parts:
        raise ValueError(
            f"A batch needs rows that divide by data * fsdp = {parts}, got {rows} rows "
            f"in {path!r}. Change the batch size or the mesh."
        )
    if len(shape) != 2:
        return NamedSharding(mesh, PartitionSpec(BATCH))
    if shape[1] % mesh.shape["context"]:
        raise ValueError(
            "A batch needs a length that divides by context = "
            f"{mesh.shape['context']}, got {shape[1]} tokens in {path!r}. Encode the "
            "texts with another length, or change the mesh."
        )
    return NamedSharding(mesh, PartitionSpec(*ROWS))


def _sizes(sizes: Mapping[str, int], count: int) -> dict[str, int]:
    asked = ", ".join(f"{name}={size}" for name, size in sizes.items())
    free = [name for name, size in sizes.items() if size == -1]
    known = math.prod(size for size in sizes.values() if size != -1)
    if len(free) > 1 or any(size < 1 and size != -1 for size in sizes.values()):
        raise ValueError(
            f"make_mesh needs sizes of 1 or more, one of which may be -1, got {asked}."
        )
    fits = count % known == 0 if free else count == known
    if not fits:
        raise ValueError(
            f"make_mesh needs sizes whose product is the number of devices, {count}, "
            f"got {asked}. Set one of them to -1 to take what is left."
        )
    return {name: count // known if name in free else n for name, n in sizes.items()}


def _matches(rule: str, path: str) -> bool:
    path = path.split(f"/{trees.LAYERS}")[0]  # layers of a leaf lie as the leaf does
    return re.fullmatch(f"(?:.*/)?(?:{rule})", path) is not None


def _names(axis: str | Sequence[str] | None) -> tuple[str, ...]:
    return (axis,) if isinstance(axis, str) else tuple(axis or ())


def _but_ones(shape: Sequence[int], axes: Sequence) -> tuple:
    """The axes of those dimensions that have more than one entry."""
    return tuple(None if n == 1 else a for n, a in zip(shape, axes, strict=False))


def _check(path: str, shape: tuple[int, ...], axes: tuple, mesh: Mesh) -> None:
    if len(axes) > len(shape):
        raise ValueError(
            f"The rule of {path!r} needs at most {len(shape)} entries, one for each "
            f"dimension of {shape}, got {axes}."
        )
    for size, axis in zip(shape, axes, strict=False):
        for name in _names(axis):
            _checks.one_of(
                f"The mesh for {path!r}", mesh.axis_names, **{"a rule's axis": name}
            )
        parts = math.prod(mesh.shape[name] for name in _names(axis))
        if size > 1 and size % parts:
            raise ValueError(
                f"The rule of {path!r} cuts a dimension of {size} in {parts} parts "
                f"({axis}), got shape {shape} on the mesh {dict(mesh.shape)}. Choose "
                "sizes that divide it, or put a rule of your own before the model's."
            )
