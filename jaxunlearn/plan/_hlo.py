# SPDX-License-Identifier: Apache-2.0
"""Bytes sent between devices, from the text of a compiled program.

XLA's cost analysis counts the body of a loop once. Here every collective counts as many
times as the loops around it run.
"""

import math
import re
from collections.abc import Mapping
from typing import NamedTuple

KINDS = (
    "all-gather",
    "all-reduce",
    "reduce-scatter",
    "all-to-all",
    "collective-permute",
)
_BITS = {"pred": 8, "s4": 4, "u4": 4, "bf16": 16, "c64": 64, "c128": 128}
_HEADER = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{\s*$")
_OP = re.compile(r"^\s+(?:ROOT )?%?([\w.\-]+) = (.*?)\s([a-z][\w\-]*)\((.*)$")
_RARE = re.compile(r'op_name="[^"]*\brare\b')


class Collective(NamedTuple):
    """All collectives of one kind in one step.

    Attributes:
        count: number of executions.
        bytes: bytes that a device sends, if each runs as a ring among n devices:
            (n - 1) / n of the full array for an all-gather, a reduce-scatter or an
            all-to-all, twice that for an all-reduce, the full array for a permutation.
    """

    count: int
    bytes: float


def collectives(text: str) -> dict[str, Collective]:
    """The collectives of one run of a compiled program, by kind.

    The body of a loop is multiplied by its trip count. A conditional counts as the
    branch that sends most, except branches under jax.named_scope("rare"). The TPU
    compiler implements some gathers as all-reduces of arrays that are zero elsewhere;
    these count as all-reduces. Its fused all-reduce-scatter counts as a reduce-scatter.
    A collective that it splits over several fusions, to overlap with other work, has
    the same channel in all of them and counts once.

    Args:
        text: compiled.as_text().
    Returns:
        {kind: Collective} of the kinds that occur; "unknown-loop" counts loops without
        a constant trip count, whose bodies count once.
    """
    computations, entry = _computations(text)

    def total(name: str, seen: set[str]) -> dict[str, Collective]:
        found: dict[str, Collective] = {}
        for line in computations.get(name, ()):
            found = _add(found, _line(line, name, computations, total, seen))
        return found

    return total(entry, set())


def _computations(text: str) -> tuple[dict[str, list[str]], str]:
    found, name, entry = {}, None, ""
    for line in text.splitlines():
        header = _HEADER.match(line)
        if header:
            name = header.group(2)
            found[name] = []
            entry = name if header.group(1) else entry
        elif line.startswith("}"):
            name = None
        elif name is not None:
            found[name].append(line)
    return found, entry


def _line(line: str, where: str, computations, total, seen) -> dict[str, Collective]:
    match = _OP.match(line)
    if not match:
        return {}
    _, result, op, rest = match.groups()
    kind = op.removesuffix("-start")
    if kind in KINDS:
        channel = re.search(r"channel_id=\d+", rest)
        if channel and channel.group() in seen:
            return {}
        seen.update([channel.group()] if channel else [])
        return _collective(kind, op, result, rest, where)
    if op == "while":
        trips = _trips(rest, computations)
        inner = total(_named(rest, "body"), set())
        unknown = {} if trips else {"unknown-loop": Collective(1, 0.0)}
        return _add(unknown, _times(inner, trips or 1))
    if op == "conditional":
        branches = re.search(r"branch_computations=\{([^}]*)\}", rest)
        names = (
            [name.strip().lstrip("%") for name in branches.group(1).split(",")]
            if branches
            else [_named(rest, f"{b}_computation") for b in ("true", "false")]
        )
        common = [n for n in names if not any(map(_RARE.search, computations[n]))]
        sums = [total(name, set()) for name in common or names]
        return max(sums, key=lambda s: sum(each.bytes for each in s.values()))
    if op in ("fusion", "call", "async-start", "custom-call"):
        name = _named(rest, "calls") or (op == "call" and _named(rest, "to_apply"))
        return total(name, seen) if name else {}
    return {}


def _collective(kind: str, op: str, result: str, rest: str, where: str):
    n = _group(rest)
    size = _bytes(result)
    if op == "all-gather-start":
        size *= n / (n + 1)  # its result type includes the operands
    elif op == "collective-permute-start":
        size /= 2
    share = (n - 1) / n
    if kind == "all-reduce" and where.startswith("all-reduce-scatter"):
        kind = "reduce-scatter"
        sent = size * share
    elif kind == "all-reduce":
        sent = 2 * size * share
    elif kind == "reduce-scatter":
        sent = size * n * share  # the result is one part
    elif kind == "collective-permute":
        sent = size
    else:
        sent = size * share
    return {kind: Collective(1, sent)}


def _bytes(result: str) -> float:
    total = 0.0
    for dtype, dims in re.findall(r"\b([a-z]+\d*\w*)\[([\d,]*)\]", result):
        bits = _BITS.get(dtype) or int(re.search(r"\d+", dtype).group())
        total += math.prod(int(d) for d in dims.split(",") if d) * bits / 8
    return total


def _group(rest: str) -> int:
    """The number of devices in one group of a collective."""
    if mesh := re.search(r"replica_groups=mesh\[([^\]]*)\]\s*\{([^}]*)\}", rest):
        sizes = dict(re.findall(r"'([^']+)'=(\d+)", mesh.group(1)))
        return math.prod(int(sizes[a]) for a in re.findall(r"'([^']+)'", mesh.group(2)))
    if iota := re.search(r"replica_groups=\[(\d+),(\d+)\]<=", rest):
        return int(iota.group(2))
    if listed := re.search(r"replica_groups=\{\{([\d,]*)\}", rest):
        return len(listed.group(1).split(","))
    return 1 if "source_target_pairs" not in rest else 2


def _trips(rest: str, computations: Mapping[str, list[str]]) -> int | None:
    if known := re.search(r'known_trip_count"?:\{"n":"(\d+)"', rest):
        return int(known.group(1))
    condition = computations.get(_named(rest, "condition"), [])
    called = [
        line
        for outer in condition
        for line in computations.get(_named(outer, "calls"), ())
    ]
    constants = [
        int(number)
        for line in condition + called
        for number in re.findall(r"[su]32\[\]\S* constant\((\d+)\)", line)
    ]
    return max(constants) if constants and max(constants) else None


def _named(rest: str, key: str) -> str:
    found = re.search(rf"\b{key}=%?([\w.\-]+)", rest)
    return found.group(1) if found else ""


def _times(found: Mapping[str, Collective], trips: int) -> dict[str, Collective]:
    return {k: Collective(trips * c.count, trips * c.bytes) for k, c in found.items()}


def _add(
    a: Mapping[str, Collective], b: Mapping[str, Collective]
) -> dict[str, Collective]:
    none = Collective(0, 0.0)
    return {
        kind: Collective(
            *map(sum, zip(a.get(kind, none), b.get(kind, none), strict=True))
        )
        for kind in a | b
    }
