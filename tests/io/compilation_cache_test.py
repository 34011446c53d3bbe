# SPDX-License-Identifier: Apache-2.0
"""The folder of compiled programs: where it is, and when there is none."""

import os
import subprocess
import sys
from pathlib import Path

import jax
import pytest

from jaxunlearn.io import compilation_cache

NAMES = (
    "jax_compilation_cache_dir",
    "jax_compilation_cache_max_size",
    "jax_enable_compilation_cache",
)


@pytest.fixture(autouse=True)
def no_folder_yet():
    """JAX without a folder during a test, and with the suite's settings after it."""
    before = {name: getattr(jax.config, name) for name in NAMES}
    jax.config.update("jax_compilation_cache_dir", None)
    yield
    for name, value in before.items():
        jax.config.update(name, value)


@pytest.fixture
def user(tmp_path, monkeypatch):
    """A user's cache folder."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_the_folder_is_below_the_users_cache_folder(user):
    folder = compilation_cache.enable()
    assert folder.is_dir() and folder.parent == user / "jaxunlearn" / "programs"
    assert jax.config.jax_compilation_cache_dir == str(folder)
    assert jax.config.jax_compilation_cache_max_size == compilation_cache.MAX_BYTES
    assert list(folder.iterdir()) == []


def test_without_xdg_it_is_that_of_the_platform(monkeypatch, tmp_path):
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr(sys, "platform", "linux")
    assert compilation_cache._user_folder() == tmp_path / ".cache"
    monkeypatch.setattr(sys, "platform", "darwin")
    assert compilation_cache._user_folder() == tmp_path / "Library" / "Caches"
    monkeypatch.setattr(sys, "platform", "win32")
    monkeypatch.setenv("LOCALAPPDATA", str(tmp_path / "local"))
    assert compilation_cache._user_folder() == tmp_path / "local"


def test_settings_of_jax_come_first(user, tmp_path):
    jax.config.update("jax_compilation_cache_dir", str(tmp_path / "mine"))
    assert compilation_cache.enable() is None
    assert jax.config.jax_compilation_cache_dir == str(tmp_path / "mine")
    jax.config.update("jax_compilation_cache_dir", None)
    compilation_cache.disable()
    assert compilation_cache.enable() is None
    assert jax.config.jax_compilation_cache_dir is None
    assert not user.exists()


def test_a_folder_that_cannot_be_made_or_written_is_no_error(user, monkeypatch):
    user.write_text("a file in its place")
    assert compilation_cache.enable() is None

    def no_home():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(Path, "home", no_home)
    assert compilation_cache.enable() is None

    def full(**_):
        raise OSError(28, "No space left on device")

    monkeypatch.setenv("XDG_CACHE_HOME", str(user.parent / "other"))
    monkeypatch.setattr(compilation_cache.tempfile, "TemporaryFile", full)
    assert compilation_cache.enable() is None
    assert jax.config.jax_compilation_cache_dir is None


@pytest.mark.slow
def test_programs_are_in_the_folder_after_the_process(user):
    code = (
        "import jax; from jaxunlearn.io import compilation_cache as c; c.enable(); "
        "print(jax.jit(lambda x: x + 1)(1))"
    )
    settings = {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | settings,
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout == "2\n" and done.stderr == ""
    (folder,) = (user / "jaxunlearn" / "programs").iterdir()
    assert any("lambda" in file.name for file in folder.iterdir())
