# SPDX-License-Identifier: Apache-2.0
"""`import jaxunlearn as ju` gives every namespace, each when it is first used."""

import ast
import subprocess
import sys
import types

import pytest

import jaxunlearn as ju
from tests.architecture import ROOT, ROWS, SIDE, TOP

ROOMS = {room for row in ROWS for room in row} | set(SIDE)
NAMESPACES = sorted(room for room in ROOMS - set(TOP) if not room.startswith("_"))


@pytest.mark.parametrize("name", NAMESPACES)
def test_every_room_is_a_namespace_and_no_function_hides_it(name):
    found = getattr(ju, name)
    assert isinstance(found, types.ModuleType)
    assert found.__name__ == f"jaxunlearn.{name}"
    assert name in dir(ju)


def test_type_checkers_see_the_same_namespaces():
    tree = ast.parse((ROOT / "jaxunlearn" / "__init__.py").read_text())
    (block,) = (node for node in tree.body if isinstance(node, ast.If))
    assert [x.names[0].name for x in block.body] == NAMESPACES == sorted(ju._NAMESPACES)


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="'metric'"):
        _ = ju.metric


def test_a_namespace_is_imported_at_its_first_use():
    program = (
        "import sys, jaxunlearn as ju\n"
        "names = [f'jaxunlearn.{x}' for x in ('attacks', 'data', 'recipes')]\n"
        "print(*[x for x in names if x in sys.modules])\n"
        "ju.recipes\n"
        "print(*[x for x in names if x in sys.modules])\n"
    )
    run = [sys.executable, "-c", program]
    result = subprocess.run(run, cwd=ROOT, check=True, capture_output=True, text=True)
    assert result.stdout.splitlines() == ["", "jaxunlearn.recipes"]
