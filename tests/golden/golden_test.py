# SPDX-License-Identifier: Apache-2.0
"""jaxunlearn reproduces other libraries' numbers, and NumPy's on other shapes."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))

import cases  # noqa: E402  found once the folder is on the path
import golden_numpy  # noqa: E402
import golden_numpy_metrics  # noqa: E402

MANIFEST = json.loads((HERE / "public.json").read_text())
ARRAYS = np.load(HERE / "public.npz")
PUBLIC = {c["name"]: c for c in MANIFEST["cases"] if cases.covered(c["name"])}
LIMITS = MANIFEST["tolerance"]
TOLERANCES = {
    "float64": {"rtol": LIMITS["default_rtol"], "atol": LIMITS["default_atol"]},
    "float32": {"rtol": LIMITS["float32_rtol"], "atol": LIMITS["float32_atol"]},
}


def read(roles):
    return {role: ARRAYS[key] for role, key in roles.items()}


def as_dtype(arrays, dtype):
    floating = {k: x.astype(dtype) for k, x in arrays.items() if x.dtype.kind == "f"}
    return {**arrays, **floating}


@pytest.mark.parametrize(
    "dtype", [pytest.param("float32", marks=pytest.mark.slow), "float64"]
)
@pytest.mark.parametrize("name", PUBLIC)
def test_public_case(name, dtype):
    case = PUBLIC[name]
    outputs = cases.run_case(case, as_dtype(read(case["inputs"]), dtype))
    assert set(outputs) == set(case["outputs"])
    for role, expected in read(case["outputs"]).items():
        kind = outputs[role].dtype.kind
        assert kind == expected.dtype.kind
        if kind == "f" and cases.traced(name):  # host functions compute in float64
            assert outputs[role].dtype == dtype
        assert outputs[role].shape == expected.shape
        np.testing.assert_allclose(
            outputs[role], expected, err_msg=role, equal_nan=True, **TOLERANCES[dtype]
        )


def test_every_case_is_covered():
    names = [case["name"] for case in MANIFEST["cases"]]
    assert len(names) >= 80
    assert [name for name in names if not cases.covered(name)] == []


def test_an_unknown_case_names_the_next_move():
    with pytest.raises(NotImplementedError, match="'telepathy'.*golden_families"):
        cases.run_case({"name": "telepathy", "outputs": {}}, {})


OTHERS = {**golden_numpy.CASES, **golden_numpy_metrics.CASES}


@pytest.mark.parametrize("name", OTHERS)
def test_other_shapes_seeds_and_hyperparameters(name):
    """The runner agrees with NumPy on cases with other shapes, seeds and settings."""
    case, inputs, expected = golden_numpy.make(name, seed=1, cases=OTHERS)
    outputs = cases.run_case(case, inputs)
    assert set(outputs) == set(expected)
    for role, value in expected.items():
        np.testing.assert_allclose(
            outputs[role], value, err_msg=role, equal_nan=True, rtol=1e-6, atol=1e-8
        )
