# SPDX-License-Identifier: Apache-2.0
"""Rooms: who may import whom, read from the sources.

docs/architecture.md draws the plan; architecture_test.py holds the code to it.
"""

import ast
import functools
import re
import sys
import tomllib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent

# From the bottom row up. A room may import the rows below it and, except in the maths
# row, rooms of the same row.
LEAVES = (
    "typing",
    "trees",
    "_checks",
    "_precision",
    "_directions",
    "_text",
    "_pixels",
    "_ahead",
    "_hosts",
    "_mesh",
    "_rules",
    "sharding",
)
MATHS = ("losses", "combine", "edits", "metrics")
GLUE = ("_step", "terms", "stats", "wrap", "_generate", "_packed", "bilevel")
PROCEDURES = ("attacks", "synth", "evaluate", "_fit", "plan")
TOP = ("workflows", "commands", "__main__")  # what runs from a shell: files allowed
ROWS = (LEAVES, MATHS, GLUE, PROCEDURES, ("recipes",), *((room,) for room in TOP))

# Side rooms hold files and libraries, and know of the others only this much. io also
# builds the decoder that a checkpoint describes, and loads it into shards.
SIDE = {
    "models": ("typing", "trees", "_checks", "_pixels", "sharding"),
    "data": ("typing", "trees", "_checks", "_pixels", "_text"),
    "io": ("typing", "trees", "_checks", "sharding", "models"),
}
# The only module of a side room that other rows may import: tables of arrays, no files.
TABLE = "data.table"

# Folders that experiments share, from the floor up: each may import those before it.
SHARED = ("shared", "small")

LEAF_LIBRARIES = ("jax", "optax", "flax.struct")
FILE_LIBRARIES = (
    "transformers",
    "tokenizers",
    "tensorflow_datasets",
    "safetensors",
    "gguf",
    "huggingface_hub",
    "grain",
    "array_record",
)
LONGEST = 400
SPDX = "# SPDX-License-Identifier: Apache-2.0"
DISTRIBUTIONS = {
    "orbax": "orbax-checkpoint",
    "PIL": "pillow",
    "absl": "absl-py",
    "yaml": "pyyaml",
    "sklearn": "scikit-learn",
}


class Source(NamedTuple):
    """A file's path inside the repository, and its text."""

    path: str
    text: str

    @property
    def room(self) -> str | None:
        """Its room in jaxunlearn; "" for a file of the package itself, None outside."""
        top, *rest = Path(self.path).with_suffix("").parts
        return None if top != "jaxunlearn" else rest[0].replace("__init__", "")

    @property
    def tree(self) -> ast.Module:
        return _parse(self.text)


Violation = tuple[int, str]  # line, what is wrong
_parse = functools.cache(ast.parse)


def imports(source: Source) -> Iterator[tuple[int, str]]:
    """(line, dotted name) of all that a file imports, anywhere and by any spelling."""
    for node in ast.walk(source.tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            module = "." * node.level + (node.module or "")
            yield from ((node.lineno, f"{module}.{a.name}") for a in node.names)
        elif isinstance(node, ast.Call) and node.args:
            name = _dotted(node.func)
            place = 1 if name == "_checks.library" else 0
            named = node.args[place : place + 1]
            if (
                name.split(".")[-1] in ("import_module", "__import__")
                or name == "_checks.library"
            ) and isinstance(named[0], ast.Constant):
                yield node.lineno, str(named[0].value)


def at_import(source: Source) -> Iterator[ast.AST]:
    """The nodes that run when a module is imported: not function bodies, not main."""
    todo: list[ast.AST] = list(source.tree.body)
    while todo:
        node = todo.pop()
        yield node
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            todo += getattr(node, "decorator_list", []) + node.args.defaults
            todo += [x for x in node.args.kw_defaults if x is not None]
        elif isinstance(node, ast.If) and "__main__" in ast.unparse(node.test):
            todo += node.orelse
        else:
            todo += ast.iter_child_nodes(node)


def _dotted(node: ast.AST) -> str:
    """`a.b.c` for an attribute chain, "" for anything else."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute) and (owner := _dotted(node.value)):
        return f"{owner}.{node.attr}"
    return ""


def _within(name: str, modules) -> bool:
    return any(name == module or name.startswith(module + ".") for module in modules)


def _aliases(source: Source) -> dict[str, str]:
    """Local name -> dotted name of what was imported under it."""
    found = {}
    for node in ast.walk(source.tree):
        if isinstance(node, ast.Import):
            found |= {a.asname: a.name for a in node.names if a.asname}
        elif isinstance(node, ast.ImportFrom):
            for alias in node.names:
                found[alias.asname or alias.name] = f"{node.module}.{alias.name}"
    return found


def _full(node: ast.AST, aliases: dict[str, str]) -> str:
    """The dotted name of an attribute chain with its first part's alias resolved."""
    first, dot, rest = _dotted(node).partition(".")
    return aliases.get(first, first) + dot + rest


def _is_a_room(name: str) -> bool:
    return name in SIDE or any(name in row for row in ROWS)


def _row(room: str) -> int:
    return next(i for i, row in enumerate(ROWS) if room in row)


# The rules: each takes a file and yields what is wrong with it, line by line.


def arrows_go_down(source: Source) -> Iterator[Violation]:
    """imports go down the rows; maths rooms and side rooms stay apart"""
    room = source.room
    if not room:
        return
    if not _is_a_room(room):
        yield 1, f"room {room!r} has no place in the plan; give it one in ROWS"
        return
    for line, name in imports(source):
        if name.startswith("."):
            yield line, f"relative import {name!r}; imports are absolute"
        if name.split(".")[0] != "jaxunlearn":
            continue
        inner = name.removeprefix("jaxunlearn").removeprefix(".")
        target = inner.split(".")[0]
        if target == room:
            continue
        if room in TOP and inner != "*" and not _is_a_room(target):
            continue  # a user of the package's public names: `import jaxunlearn as ju`
        if room in SIDE:
            fine = target in SIDE[room]
        elif target in SIDE:
            fine = room in TOP or (room in PROCEDURES and _within(inner, (TABLE,)))
        elif not _is_a_room(target):
            fine = False
        else:
            same = _row(target) == _row(room)
            fine = room not in MATHS if same else _row(target) < _row(room)
        if not fine:
            yield line, f"{room} may not import {name}"


def leaves_are_light(source: Source) -> Iterator[Violation]:
    """leaves import only jax, optax, flax.struct and the standard library"""
    if source.room not in LEAVES:
        return
    for line, name in imports(source):
        top = name.split(".")[0]
        if top in sys.stdlib_module_names or top == "jaxunlearn":
            continue
        if not _within(name, LEAF_LIBRARIES):
            yield line, f"leaf {source.room} may not import {name}"


def maths_has_no_hidden_dice(source: Source) -> Iterator[Violation]:
    """leaves and the maths row use neither numpy.random nor the random module"""
    if source.room not in MATHS + LEAVES:
        return
    forbidden = ("numpy.random", "random")
    aliases = _aliases(source)
    for line, name in imports(source):
        if _within(name, forbidden):
            yield line, f"{name} in {source.room}; take a key as an argument"
    for node in ast.walk(source.tree):
        if isinstance(node, ast.Attribute) and _full(node, aliases) == "numpy.random":
            yield (
                node.lineno,
                f"numpy.random in {source.room}; take a key as an argument",
            )


def file_libraries_stay_in_side_rooms(source: Source) -> Iterator[Violation]:
    """libraries for files and tokenizers appear only in data, io, the top and tests"""
    if source.room in (None, "data", "io", *TOP):
        return
    for line, name in imports(source):
        if _within(name, FILE_LIBRARIES):
            yield line, f"{name} outside data, io, the top rooms and tests"


def torch_is_for_comparison(source: Source) -> Iterator[Violation]:
    """torch appears only in tests and experiments/benchmarks"""
    if source.path.startswith(("tests/", "experiments/benchmarks/")):
        return
    for line, name in imports(source):
        if _within(name, ("torch",)):
            yield line, f"{name} outside tests and experiments/benchmarks"


def nothing_is_read_at_import(source: Source) -> Iterator[Violation]:
    """no flag and no environment variable is read when a module is imported"""
    if source.path.startswith("tests/"):  # conftest.py must set flags before jax starts
        return
    aliases = _aliases(source)
    forbidden = ("sys.argv", "os.environ", "os.getenv")
    for node in at_import(source):
        if isinstance(node, ast.Name | ast.Attribute) and (
            _full(node, aliases) in forbidden
        ):
            yield node.lineno, f"{_full(node, aliases)} is read at import"
        if isinstance(node, ast.Call) and _dotted(node.func).endswith("parse_args"):
            yield node.lineno, "flags are parsed at import"


def no_global_mesh(source: Source) -> Iterator[Violation]:
    """meshes are passed; none is made at import or set for good"""
    if source.room is None:
        return
    makers = ("Mesh", "AbstractMesh", "make_mesh", "set_mesh", "use_mesh")
    for node in at_import(source):
        if isinstance(node, ast.Call) and _dotted(node.func).split(".")[-1] in makers:
            yield node.lineno, f"{_dotted(node.func)} runs at import"
    for node in ast.walk(source.tree):
        call = node.value if isinstance(node, ast.Expr | ast.Assign) else None
        if isinstance(call, ast.Call) and _dotted(call.func).endswith("set_mesh"):
            yield node.lineno, "set_mesh outside a with statement"


def texts_are_utf8(source: Source) -> Iterator[Violation]:
    """text files are read and written with an encoding, never the machine's"""
    if source.path.startswith("tests/"):
        return
    ours = _aliases(source)
    for node in ast.walk(source.tree):
        if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)):
            continue
        if node.func.attr not in ("read_text", "write_text"):
            continue
        arguments = [x.value for x in node.args if isinstance(x, ast.Constant)]
        arguments += [x.arg for x in node.keywords]
        of_module = isinstance(node.func.value, ast.Name) and node.func.value.id in ours
        if not (of_module or "encoding" in arguments or "utf-8" in arguments):
            yield node.lineno, f'{node.func.attr} without encoding="utf-8"'


def modules_are_short(source: Source) -> Iterator[Violation]:
    """a module over 400 lines says "Over 400 lines because" in its docstring"""
    lines = source.text.count("\n")
    reason = ast.get_docstring(source.tree) or ""
    if lines > LONGEST and "Over 400 lines because" not in reason:
        yield LONGEST + 1, f"{lines} lines; a longer file usually holds two ideas"


def the_licence_comes_first(source: Source) -> Iterator[Violation]:
    """every file starts with the SPDX line"""
    if source.text.split("\n", 1)[0] != SPDX:
        yield 1, f"the first line is not {SPDX!r}"


def nothing_imports_the_top(source: Source) -> Iterator[Violation]:
    """jaxunlearn imports neither experiments nor tests; experiments import no tests"""
    if source.path.startswith("tests/"):
        return
    top = ("tests",) if source.room is None else ("experiments", "tests")
    for line, name in imports(source):
        if _within(name, top):
            yield line, f"{name} may be imported by tests alone"


def shared_experiments_import_downwards(source: Source) -> Iterator[Violation]:
    """experiments/shared imports no other experiment, experiments/small only shared"""
    top, *rest = Path(source.path).with_suffix("").parts
    if top != "experiments" or rest[0] not in SHARED:
        return
    below = SHARED[: SHARED.index(rest[0]) + 1]
    for line, name in imports(source):
        folder = name.split(".")[1:2]
        if _within(name, ("experiments",)) and not set(folder) <= set(below):
            yield line, f"experiments/{rest[0]} may not import {name}"


def libraries_are_declared(source: Source) -> Iterator[Violation]:
    """every library that is imported is a dependency or an extra in pyproject.toml"""
    for line, name in imports(source):
        top = name.split(".")[0]
        if not top or top in sys.stdlib_module_names or top in _ours():
            continue
        if DISTRIBUTIONS.get(top, top).replace("_", "-") not in _declared():
            yield line, f"{top} is not declared in pyproject.toml"


@functools.cache
def _ours() -> set[str]:
    """Top names that are no libraries: ours, and those tests import from a folder."""
    modules = {name for x in (ROOT / "tests").rglob("*.py") for name in x.parts[-2:]}
    return {"jaxunlearn", "experiments"} | {x.removesuffix(".py") for x in modules}


@functools.cache
def _declared() -> set[str]:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    lists = [project["dependencies"], *project["optional-dependencies"].values()]
    names = (re.match(r"[\w.-]+", line)[0] for lines in lists for line in lines)
    return {name.replace("_", "-").lower() for name in names}


Rule = Callable[[Source], Iterator[Violation]]
RULES: tuple[Rule, ...] = (
    arrows_go_down,
    leaves_are_light,
    maths_has_no_hidden_dice,
    file_libraries_stay_in_side_rooms,
    torch_is_for_comparison,
    nothing_is_read_at_import,
    no_global_mesh,
    texts_are_utf8,
    modules_are_short,
    the_licence_comes_first,
    nothing_imports_the_top,
    shared_experiments_import_downwards,
    libraries_are_declared,
)


@functools.cache
def sources() -> tuple[Source, ...]:
    """Every Python file of the repository's three folders."""
    tops = (ROOT / top for top in ("jaxunlearn", "experiments", "tests"))
    files = (file for top in tops for file in sorted(top.rglob("*.py")))
    return tuple(Source(f.relative_to(ROOT).as_posix(), f.read_text()) for f in files)


def violations(rule: Rule, files: Iterable[Source]) -> list[str]:
    """What breaks a rule, as `file:line: what is wrong`."""
    return [f"{f.path}:{line}: {text}" for f in files for line, text in rule(f)]


def rooms_graph(files: Iterable[Source]) -> dict[str, set[str]]:
    """Room -> the other rooms that it imports, anywhere."""
    graph: dict[str, set[str]] = {}
    for source in files:
        if source.room:
            names = [n for _, n in imports(source) if n.startswith("jaxunlearn.")]
            graph.setdefault(source.room, set()).update(n.split(".")[1] for n in names)
            graph[source.room].discard(source.room)
    return graph
