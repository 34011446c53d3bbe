# SPDX-License-Identifier: Apache-2.0
"""Meshes, and ordered rules that say how each leaf is placed on one.

A rule is (pattern, axes): leaves whose path matches the regular expression are split as
`axes` says, one entry for each dimension: None, a mesh axis, or several. The first
matching rule decides. Models have theirs in `model.rules`; put other rules before them.

    mesh = sharding.make_mesh(fsdp=4, tensor=2)
    params = sharding.create(model.init, mesh, model.rules, key)
    state = sharding.create(
        partial(ju.init_state, tx=tx), mesh, model.rules, params, key=key)
    step = sharding.jit_step(ju.make_step(parts, tx), mesh, model.rules, state)

`Recipe.setup(model, params, mesh=mesh)` does the same in one call. Patterns also match
the end of a path, so that the same rules place the parameters, their gradients and the
optimizer's moments.

Every function here takes a mesh with Explicit axes too, which jax.make_mesh makes by
default, and works on the same devices with Auto axes (`auto_axes`).
"""

import math
from collections.abc import Callable, Mapping, Sequence

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxunlearn import _checks, trees
from jaxunlearn._hosts import initialize as initialize
from jaxunlearn._mesh import AXES as AXES
from jaxunlearn._mesh import auto_axes as auto_axes
from jaxunlearn._mesh import explicit_axes
from jaxunlearn._mesh import make_mesh as make_mesh
from jaxunlearn._mesh import on_mesh as on_mesh
from jaxunlearn._rules import axes_of as axes_of
from jaxunlearn._rules import matches, names_of
from jaxunlearn._rules import override as override
from jaxunlearn._rules import zero as zero
from jaxunlearn.typing import Array, PyTree, Rules

BATCH = ("data", "fsdp", "expert")  # the axes over which the rows of a batch are split
ROWS = (BATCH, "context")  # how rows of tokens, [B, L, ...], are split
HOST = r"opt_state/.*"  # the optimizer's state, for the argument `host`


def by_rules(tree: PyTree, mesh: Mesh, rules: Rules, host: str | None = None) -> PyTree:
    """A NamedSharding for each leaf, by the first rule that matches its path.

    Args:
        tree: arrays or jax.ShapeDtypeStructs (jax.eval_shape gives them), such as
            params, a gradient tree or an UnlearnState. None stays None.
        mesh: where the leaves will be placed.
        rules: ordered (pattern, axes). The pattern must match the full path, or all of
            it after some slash. Dimensions beyond `axes` are not split; dimensions of
            size 1 (of a mask, for example), scalars and PRNG keys never are.
        host: pattern, as of a rule, of the leaves that are kept in pinned memory of
            the host, such as HOST for the optimizer's state; scalars and PRNG keys stay
            on the device. None keeps all leaves on the device.
    Returns:
        A tree like `tree` of NamedShardings.
    Raises:
        ValueError: if no rule matches a leaf, a rule names an axis that the mesh lacks
            or has more entries than the leaf has dimensions, or an axis does not divide
            its dimension.
    """
    mesh = auto_axes(mesh)

    def leaf(path, x):
        axes = axes_of(path, rules) if x.shape else ()
        _check(path, x.shape, axes, mesh)
        kind = "pinned_host" if host and x.shape and matches(host, path) else None
        split = PartitionSpec(*_but_ones(x.shape, axes))
        return NamedSharding(mesh, split, memory_kind=kind)

    return trees.map_with_path(leaf, tree)


def create(
    function: Callable[..., PyTree],
    mesh: Mesh,
    rules: Rules,
    *args,
    host: str | None = None,
    **kwargs,
) -> PyTree:
    """function(*args, **kwargs), with each leaf created directly in its shards.

    Args:
        function: pure, such as `model.init` or partial(init_state, tx=tx).
        mesh: where the result will be placed.
        rules: as for `by_rules`, with the same errors.
        *args, **kwargs: arrays or trees of them.
        host: as for `by_rules`.
    """
    mesh = auto_axes(mesh)
    out = by_rules(jax.eval_shape(function, *args, **kwargs), mesh, rules, host)
    with jax.set_mesh(mesh):
        return jax.jit(function, out_shardings=out)(*args, **kwargs)


def put_rows(tree: PyTree, mesh: Mesh) -> PyTree:
    """Streams of batches onto the mesh: rows over data, fsdp and expert, tokens over
    context.

    Args:
        tree: host arrays; the second of two dimensions is tokens. With several
            processes each passes its share of the rows. A jax.ShapeDtypeStruct, of all
            rows, is returned with its sharding.
        mesh: where they go.
    Raises:
        ValueError: if the rows do not divide by data * fsdp * expert, or tokens
            by context.
    """
    mesh = auto_axes(mesh)

    def leaf(path, x):
        place = getattr(x, "sharding", None)
        if isinstance(place, NamedSharding) and not explicit_axes(place.mesh):
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
    step: Callable[..., tuple[PyTree, PyTree]],
    mesh: Mesh,
    rules: Rules,
    state: PyTree,
    *,
    host: str | None = None,
) -> Callable[..., tuple[PyTree, PyTree]]:
    """The jitted step on a mesh: state donated and left in its shards, rows split.

    Args:
        step: from make_step; it gets `rules` too.
        mesh: where `create` placed the state.
        rules: the rules by which it was placed.
        state: the state, or its shapes.
        host: the pattern by which it was placed. Each step copies those leaves to the
            device and back, 2 bytes moved for each byte of theirs.
    Returns:
        A function like `step`, whose streams may come from the host, with `trace` and
        `lower` of a jitted function. Its Frozen should be on the mesh already:
        jax.device_put(params, by_rules(params, mesh, rules)). Its first call raises
        ValueError if an array of the state is not placed as the rules say, or an array
        of the state or Frozen is on a mesh with Explicit axes.
    """
    mesh = auto_axes(mesh)
    places = by_rules(state, mesh, rules, host)
    near = by_rules(state, mesh, rules)

    def step_with_rules(state, streams, frozen, **more):
        if host is not None:
            state = jax.tree.map(
                lambda x, there, here: x if there == here else jax.device_put(x, here),
                *(state, places, near),
            )
        return step(state, streams, frozen, rules=rules, **more)

    jitted = jax.jit(
        step_with_rules,
        donate_argnums=0,
        out_shardings=(places, NamedSharding(mesh, PartitionSpec())),
    )

    def on_mesh(function):
        def call(state, streams, frozen, **more):
            with jax.set_mesh(mesh):
                return function(state, put_rows(streams, mesh), frozen, **more)

        return call

    call, checked = on_mesh(jitted), False

    def run(state, streams, frozen, **more):
        nonlocal checked
        if not checked:  # later states come from the step, which leaves them in place
            _placed(state, places)
            _auto(frozen)
            checked = True
        return call(state, streams, frozen, **more)

    run.trace, run.lower = on_mesh(jitted.trace), on_mesh(jitted.lower)
    if hasattr(step, "check"):  # of make_step, for `fit`
        run.check, run.takes_enabled = step.check, True
    return run


def _auto(tree: PyTree) -> None:
    """Raises ValueError if an array is on a mesh with Explicit axes."""
    for path, x in trees.paths(tree).items():
        place = getattr(x, "sharding", None)
        if isinstance(place, NamedSharding) and (names := explicit_axes(place.mesh)):
            raise ValueError(
                f"jit_step needs arrays on a mesh with Auto axes, got {path!r} with "
                f"the Explicit axes {_checks.listed(names)}. Move them by "
                "jax.device_put(x, sharding.by_rules(x, mesh, rules))."
            )


def _placed(state: PyTree, places: PyTree) -> None:
    """Raises ValueError unless every array of the state has its sharding of places."""
    _auto(state)
    found, wanted = trees.paths(state), trees.paths(places)
    for path, x in found.items():
        place, now = wanted[path], getattr(x, "sharding", None)
        if now is None or not now.is_equivalent_to(place, len(x.shape)):
            raise ValueError(
                "jit_step needs a state that is placed on the mesh by its rules, got "
                f"{path!r} with {now or 'no sharding'} in place of {place}. Make the "
                "state by sharding.create(partial(ju.init_state, tx=tx), mesh, rules, "
                "params, key=key) or by Recipe.setup(model, params, mesh=mesh)."
            )


def constrain(x: Array, *axes: str | Sequence[str] | None) -> Array:
    """`x` with the constraint that it is split by `axes`; `x` itself without a mesh.

    The mesh is that of the caller's `jax.set_mesh`. An axis that the mesh lacks or that
    does not divide its dimension is left out, because activations have many shapes.

    Raises:
        ValueError: if the mesh of `jax.set_mesh` has Explicit axes.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if names := explicit_axes(mesh):
        raise ValueError(
            "The models of jaxunlearn need a mesh with Auto axes in jax.set_mesh, got "
            f"the Explicit axes {_checks.listed(names)}. Use jax.set_mesh("
            "sharding.auto_axes(mesh)), and move arrays onto that mesh."
        )
    if mesh.empty or all(mesh.shape[a] == 1 for a in mesh.axis_names):
        return x
    return jax.lax.with_sharding_constraint(x, spec(x.shape, *axes))


def spec(shape: Sequence[int], *axes: str | Sequence[str] | None) -> PartitionSpec:
    """`axes` without those that the caller's mesh lacks or that do not divide."""
    mesh = jax.sharding.get_abstract_mesh()
    found = []
    for size, axis in zip(shape, axes, strict=False):
        names = [n for n in names_of(axis) if n in mesh.shape]
        parts = math.prod(mesh.shape[n] for n in names)
        found.append(tuple(names) if names and size % parts == 0 else None)
    return PartitionSpec(*found)


def parts_of(axis: str) -> int:
    """Size of `axis` in the mesh of the caller's `jax.set_mesh`; 1 if it has none."""
    return dict(jax.sharding.get_abstract_mesh().shape).get(axis, 1)


def platform() -> str:
    """ "cpu", "gpu" or "tpu": of the caller's mesh if one is set, else of jax."""
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

    The compiler alone would run one all-reduce after the other, one for each way in
    which leaves are split. Here every device adds the pieces that it holds of all
    leaves (of a piece with several copies only the first copy), and one small array is
    reduced. Sums of integers are exact.

    Args:
        function: (index of the leaf, *arrays) -> k scalars that add up over pieces of
            the arrays, such as (i, x) -> [jnp.sum(x * x)].
        leaves: path -> the arrays of one shape that `function` takes.
        groups: indices of the leaves of each sum.
        rules: how the leaves are placed on the mesh of the caller's `jax.set_mesh`. If
            None, or where no mesh is set, the compiler places the sums.
    Returns:
        [groups, k].
    """
    columns = list(leaves.values())

    def add(columns, counts):
        parts = [function(i, *x) for i, x in enumerate(columns)]
        parts = [
            values
            if once is True
            else [jnp.where(once, x, jnp.zeros_like(x)) for x in values]
            for values, once in zip(parts, counts, strict=True)
        ]
        rows = [
            jnp.stack([sum(k[1:], start=k[0]) for k in zip(*values, strict=True)])
            for values in ([parts[i] for i in group] for group in groups)
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

    def first(axes):
        """Whether this device is the first of those that hold the same piece."""
        held = {name for axis in axes for name in names_of(axis)}
        rest = [n for n in mesh.axis_names if n not in held and mesh.shape[n] > 1]
        return jax.lax.axis_index(rest) == 0 if rest else True

    return jax.shard_map(
        lambda x: jax.lax.psum(add(x, [first(a) for a in axes]), mesh.axis_names),
        in_specs=(specs,),
        out_specs=PartitionSpec(),
        check_vma=False,  # psum over all axes gives every device the same
    )(columns)


def _rows(path: str, shape: tuple[int, ...], mesh: Mesh) -> NamedSharding:
    rows = shape[0]
    parts = math.prod(mesh.shape.get(axis, 1) for axis in BATCH)
    if rows % parts:
        raise ValueError(
            f"A batch needs rows that divide by expert * data * fsdp = {parts}, got "
            f"{rows} rows in {path!r}. Change the batch size or the mesh."
        )
    batch = tuple(axis for axis in BATCH if axis in mesh.shape)
    if len(shape) != 2:
        return NamedSharding(mesh, PartitionSpec(batch))
    parts = mesh.shape.get("context", 1)
    if shape[1] % parts:
        raise ValueError(
            "A batch needs a length that divides by context = "
            f"{parts}, got {shape[1]} tokens in {path!r}. Encode the "
            "texts with another length, or change the mesh."
        )
    tokens = "context" if "context" in mesh.shape else None
    return NamedSharding(mesh, PartitionSpec(batch, tokens))


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
        for name in names_of(axis):
            _checks.one_of(
                f"The mesh for {path!r}", mesh.axis_names, **{"a rule's axis": name}
            )
        parts = math.prod(mesh.shape[name] for name in names_of(axis))
        if size > 1 and size % parts:
            raise ValueError(
                f"The rule of {path!r} splits a dimension of {size} in {parts} parts "
                f"({axis}), got shape {shape} on the mesh {dict(mesh.shape)}. Choose "
                "sizes that divide it, or put another rule before the model's."
            )
