# SPDX-License-Identifier: Apache-2.0
"""In tests a warning is an error where a module of ours is the caller."""

import warnings

import pytest


def warned(module, category):
    """Warns as a library does about a call in `module`."""
    code = "warnings.warn('old', category)"
    exec(code, {"__name__": module, "warnings": warnings, "category": category})


@pytest.mark.parametrize("module", ["jaxunlearn", "jaxunlearn.io.hf", "experiments.a"])
@pytest.mark.parametrize("category", [DeprecationWarning, UserWarning])
def test_a_warning_about_our_call_is_an_error(module, category):
    with pytest.raises(category):
        warned(module, category)


@pytest.mark.parametrize("module", ["jax.numpy", "jaxunlearn_user"])
def test_other_warnings_are_not(module):
    with pytest.warns(DeprecationWarning):
        warned(module, DeprecationWarning)
    with warnings.catch_warnings(record=True) as found:
        warned(module, DeprecationWarning)
    assert len(found) == 1
