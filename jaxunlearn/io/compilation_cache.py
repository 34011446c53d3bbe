# SPDX-License-Identifier: Apache-2.0
"""Compiled programs that stay in the user's cache folder, for the next command.

It is JAX's persistent compilation cache with a folder, a limit of size and no errors.
All commands and the quickstart call `enable`; `--no-compilation-cache` calls `disable`.
The folder is jaxunlearn/programs in $XDG_CACHE_HOME, by default ~/.cache (on macOS
~/Library/Caches, on Windows %LOCALAPPDATA%); it may be deleted at any time. JAX's own
settings come first: with JAX_COMPILATION_CACHE_DIR that folder is used, and
JAX_ENABLE_COMPILATION_CACHE=false turns the cache off.
"""

import hashlib
import importlib.util
import os
import platform
import sys
import tempfile
from pathlib import Path

import jax

MAX_BYTES = 2 * 2**30
"""Where the programs of one kind of machine are larger together, the least recently
used ones are removed. A program of SmolLM2-135M takes a few MB."""


def enable() -> Path | None:
    """Makes JAX keep compiled programs that took a second or longer.

    Returns:
        The folder; None if JAX's own settings decide, or the folder cannot be written.
        Programs are then compiled as if there were no cache.
    """
    if (
        jax.config.jax_compilation_cache_dir
        or not jax.config.jax_enable_compilation_cache
    ):
        return None
    try:
        folder = _user_folder() / "jaxunlearn" / "programs" / _machine()
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except (OSError, RuntimeError):  # RuntimeError: there is no home folder
        return None
    if importlib.util.find_spec("filelock"):  # JAX needs it to remove programs
        jax.config.update("jax_compilation_cache_max_size", MAX_BYTES)
    jax.config.update("jax_compilation_cache_dir", str(folder))
    return folder


def disable() -> None:
    """Turns every persistent cache of JAX off."""
    jax.config.update("jax_enable_compilation_cache", False)


def _user_folder() -> Path:
    """The folder for caches by the convention of the platform."""
    if given := os.environ.get("XDG_CACHE_HOME"):
        return Path(given)
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches"
    if sys.platform == "win32" and (given := os.environ.get("LOCALAPPDATA")):
        return Path(given)
    return Path.home() / ".cache"


def _machine() -> str:
    """A name for machines with the same instructions.

    JAX does not distinguish CPUs in its cache, and a home folder may be shared by
    machines of which some lack an instruction that a program uses.
    """
    cpu = [platform.machine(), platform.processor()]
    info = Path("/proc/cpuinfo")
    if info.exists():
        lines = info.read_text(encoding="utf-8", errors="replace").splitlines()
        flags = (line for line in lines if line.startswith(("flags", "Features")))
        cpu.append(next(flags, ""))
    return hashlib.sha256("\n".join(cpu).encode()).hexdigest()[:16]
