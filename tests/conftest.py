# SPDX-License-Identifier: Apache-2.0
"""Eight simulated devices, strict promotion, and what keeps compilation short.

The programs of the tests are tiny, so most of the time goes into tracing and compiling
them. XLA does not optimise them or split them for parallel compilation, all workers
share one cache of compiled programs, and Python collects garbage less often.
"""

import gc
import os
import tempfile
from importlib import metadata
from pathlib import Path

FLAGS = [
    os.environ.get("XLA_FLAGS", ""),
    "--xla_force_host_platform_device_count=8",
    "--xla_backend_optimization_level=0",
    "--xla_cpu_parallel_codegen_split_count=1",
    # On a busy machine one simulated device can wait long for the others; by default
    # XLA ends the process after 40 seconds.
    "--xla_cpu_collective_call_terminate_timeout_seconds=600",
]
if metadata.version("jaxlib").startswith("0.10."):
    # The older emitter of CPU code compiles four times as fast; later jaxlibs lack it.
    FLAGS.append("--xla_cpu_use_fusion_emitters=false")
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = " ".join(FLAGS)
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import jax  # noqa: E402  the flags above must be set before jax starts
import pytest  # noqa: E402

folder = os.environ.get("JAXUNLEARN_TEST_CACHE", tempfile.gettempdir())
cache = Path(folder) / "jaxunlearn-xla"
jax.config.update("jax_compilation_cache_dir", str(cache))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
jax.config.update("jax_numpy_dtype_promotion", "strict")
gc.set_threshold(50_000, 50, 100)  # tracing makes many objects and few cycles


@pytest.fixture(scope="session", autouse=True)
def auto_is_float32_on_every_machine():
    """Numbers of tests do not depend on the processor; tests of "auto" name theirs."""
    from jaxunlearn.models import _matmul

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_matmul, "_processor_flags", frozenset)
        yield


# Linux gives a process 65,530 memory maps, and each loaded program holds several.
MAPS = Path("/proc/self/maps")
MAX_MAPS = 40_000


@pytest.fixture(scope="module", autouse=True)
def loaded_programs_stay_below_the_limit_of_maps():
    """Unloads all programs where the next module's could pass the limit."""
    yield
    if MAPS.exists() and MAPS.read_bytes().count(b"\n") > MAX_MAPS:
        jax.clear_caches()
