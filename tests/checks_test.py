# SPDX-License-Identifier: Apache-2.0
"""Errors of the checks; traced values pass."""

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st

from jaxunlearn import _checks

NUMBERS = {
    "positive": (_checks.positive, lambda x: x > 0),
    "not_negative": (_checks.not_negative, lambda x: x >= 0),
    "finite": (_checks.finite, lambda x: True),
}


@pytest.mark.parametrize("check", NUMBERS)
@hypothesis.given(st.floats() | st.integers(-9, 9))
def test_numbers_pass_only_in_range(check, number):
    function, allowed = NUMBERS[check]
    if np.isfinite(number) and allowed(number):
        function("owner", beta=number)
        function("owner", beta=jnp.float32(1.0), alpha=np.float64(1.0))
        return
    with pytest.raises(ValueError, match=r"^owner needs .*beta.* got beta="):
        function("owner", alpha=1.0, beta=number)


@pytest.mark.parametrize("check", NUMBERS)
def test_traced_values_and_schedules_pass(check):
    function, _ = NUMBERS[check]

    @jax.jit
    def traced(x):
        function("owner", beta=x)
        return x

    assert float(traced(jnp.float32(-1.0))) == -1.0
    function("owner", beta=lambda count: -1.0)


@pytest.mark.parametrize("value", ["a lot", None, [1, 2]])
def test_a_value_that_is_not_a_number_is_a_type_error(value):
    with pytest.raises(TypeError, match="A number was needed, got"):
        _checks.positive("owner", beta=value)


@pytest.mark.parametrize(
    ("value", "error"),
    [(0, ValueError), (-3, ValueError), (2.0, TypeError), (True, TypeError)],
)
def test_positive_int(value, error):
    _checks.positive_int("owner", size=1)
    with pytest.raises(error, match=f"owner needs .*size.*got size={value}"):
        _checks.positive_int("owner", size=value)


def test_one_of_suggests_the_closest():
    _checks.one_of("owner", ("token", "sequence"), reduce="token")
    with pytest.raises(ValueError, match="got reduce='tokens'. Did you mean 'token'?"):
        _checks.one_of("owner", ("token", "sequence"), reduce="tokens")
    with pytest.raises(ValueError, match=r"'sequence', got reduce='xyz'\.$"):
        _checks.one_of("owner", ("token", "sequence"), reduce="xyz")


def test_same_shape_ignores_what_is_none():
    _checks.same_shape("owner", a=jnp.ones(3), b=None, c=np.ones(3))
    with pytest.raises(ValueError, match=r"got a \(3,\), b \(2, 1\)\."):
        _checks.same_shape("owner", a=jnp.ones(3), b=jnp.ones((2, 1)))


def test_a_mask_is_boolean_and_of_the_right_shape():
    _checks.mask("owner", None, x=jnp.ones(3))
    _checks.mask("owner", jnp.ones(3, bool), x=jnp.ones(3))
    with pytest.raises(TypeError, match="boolean where, got dtype int32"):
        _checks.mask("owner", jnp.ones(3, jnp.int32), x=jnp.ones(3))
    with pytest.raises(ValueError, match="one shape"):
        _checks.mask("owner", jnp.ones(2, bool), x=jnp.ones(3))


def test_missing_keys_print_as_written():
    _checks.has_keys("owner", "streams", ("a",), {"a": 1, "b": 2}, "Add it.")
    with pytest.raises(KeyError) as info:
        _checks.has_keys("owner", "streams", ("a", "c"), ["b"], "Add it.")
    assert str(info.value) == "owner reads streams 'a', 'c', but there is 'b'. Add it."
    with pytest.raises(KeyError, match="but there is nothing"):
        _checks.has_keys("owner", "streams", ("a",), {}, "Add it.")


def test_listed_is_short():
    assert _checks.listed([]) == "nothing"
    assert _checks.listed(["a", 1]) == "'a', 1"
    assert _checks.listed(range(10), max_names=8) == "0, 1, 2, 3, 4, 5, 6, 7 and 2 more"


def test_a_missing_library_is_named_with_the_extra_that_installs_it():
    absent = "no_such.thing"  # a variable: tests/architecture.py reads constants
    with pytest.raises(ImportError, match=r"rouge.*no_such.*jaxunlearn\[metrics\]"):
        _checks.library("rouge", absent, "metrics")
