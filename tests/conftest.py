# SPDX-License-Identifier: Apache-2.0
"""Eight pretend devices, strict promotion and one compilation cache for the suite."""

import os
import tempfile
from pathlib import Path

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
)
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import jax  # noqa: E402  the flags above must be set before jax starts
import pytest  # noqa: E402

kept = os.environ.get("JAXUNLEARN_TEST_CACHE", tempfile.gettempdir())
cache = Path(kept) / "jaxunlearn-xla"
jax.config.update("jax_compilation_cache_dir", str(cache))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
jax.config.update("jax_numpy_dtype_promotion", "strict")


@pytest.fixture(scope="module", autouse=True)
def compiled_programs_end_with_their_module():
    """Each loaded program holds several memory maps, of which Linux gives a process
    65,530: a worker that kept the whole suite's would crash while loading one more."""
    yield
    jax.clear_caches()
