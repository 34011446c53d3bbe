# SPDX-License-Identifier: Apache-2.0
"""In tests a warning is an error where a module of ours is the caller."""

import warnings

import pytest


def warned(module, category):
    """Warns as a library does about a call in `module`."""
    code = "warnings.warn('old', category)"
    exec(code, {"__name__": module, "warnings": warnings, "category": category})


@pytest.mark.parametrize("module", ["jaxunlearn", "jaxunlearn.io.hf", "experiments.a"])
@pytest.mark.parametrize("category", [DeprecationWarning, FutureWarning])
def test_a_warning_about_our_call_is_an_error(module, category):
    with pytest.raises(category):
        warned(module, category)


def test_a_librarys_message_about_our_call_is_an_error():
    with pytest.raises(UserWarning):
        warned("jaxunlearn._fit", UserWarning)


@pytest.mark.parametrize(
    ("module", "category"),
    [
        ("jax.numpy", DeprecationWarning),
        ("jaxunlearn_user", DeprecationWarning),
        ("jaxunlearn.workflows.evaluation.run", UserWarning),
    ],
)
def test_other_warnings_are_not(module, category):
    with warnings.catch_warnings(record=True) as found:
        warned(module, category)
    assert len(found) == 1
