# SPDX-License-Identifier: Apache-2.0
"""The sections of `accelerator`: each measures something and appends its lines.

`run` is what a section's process calls. One thing that fails inside a section, such as
a step that does not fit, is recorded and the section goes on.
"""

import dataclasses
import time
from collections.abc import Callable, Mapping
from functools import partial
from importlib import metadata, util
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import jaxunlearn as ju
from experiments.benchmarks import accelerator
from experiments.benchmarks import accelerator_steps as shared
from jaxunlearn import attacks, losses, models, plan, sharding, terms
from jaxunlearn.io import checkpoint

KERNELS = {"gpu": ("cudnn",), "tpu": ("splash",), "cpu": ("splash",)}


class Run(NamedTuple):
    """What a section gets."""

    sizes: shared.Sizes
    add: Callable[..., None]


def run(name: str, prefix: Path, rehearse: bool) -> None:
    """Runs one section; its lines go to PREFIX.jsonl. What is there is not run again.

    Raises:
        RuntimeError: if something in it failed; the lines name it.
    """
    failed, before = [], accelerator.content(prefix)
    jax.config.update("jax_compilation_cache_dir", f"{prefix}_compiled")
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)

    def add(key: str, function: Callable[[], Mapping[str, Any]]) -> None:
        """Appends {"key": key, **function()}, or why it failed."""
        if "failed" not in before.get(key, {"failed": "no line"}):
            return
        try:
            line = dict(function())
        except Exception as error:
            line = {"failed": accelerator.reason(error)}
            failed.append(key)
        accelerator.append(prefix, {"key": key, **line})
        print(f"  {key}: {_brief(line)}", flush=True)

    sizes = shared.TINY if rehearse else shared.Sizes()
    rows = max(sizes.rows, len(jax.devices()))
    SECTIONS[name](Run(sizes._replace(rows=rows), add))
    if failed:
        raise RuntimeError(f"failed inside it: {', '.join(failed)}")


def device(run: Run) -> None:
    """What the machine is, and the rate of one product."""
    run.add("device", partial(_device, run.sizes))


def _device(sizes: shared.Sizes) -> dict[str, Any]:
    first = jax.devices()[0]
    peak = plan.peak_flops(jax.devices())
    x = jnp.ones((sizes.matmul, sizes.matmul), jnp.bfloat16)
    product = jax.jit(lambda a, b: a @ b)
    seconds = shared.median_seconds(lambda: product(x, x))
    return {
        "kind": first.device_kind,
        "platform": first.platform,
        "count": len(jax.devices()),
        "memory": shared.memory_stats().get("bytes_limit"),
        "peak_tflops": None if peak is None else peak / 1e12,
        "matmul_size": sizes.matmul,
        "matmul_tflops": 2e-12 * sizes.matmul**3 / seconds,
        "versions": _versions(),
        "rehearsal": sizes.tiny,
    }


def _versions() -> dict[str, str]:
    """Of what is installed; a machine for this run may lack the rest."""
    found = {}
    for name in (*checkpoint.LIBRARIES, "tokamax", "torch"):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def step_is_right(run: Run) -> None:
    """The gradients and three steps of the accelerator beside those of the CPU."""
    run.add(
        "check BLUR's float32 gradients and three steps, on accelerator and CPU",
        partial(_step_error, shared.small_config(run.sizes), run.sizes),
    )
    run.add(
        "check NPO's gradients, bfloat16 on the accelerator and float32 on the CPU",
        partial(_bfloat16_error, shared.small_config(run.sizes), run.sizes),
    )


def _step_error(config, sizes: shared.Sizes) -> dict[str, float]:
    """The largest of the relative errors of gradients (norm by leaf) and metrics."""
    with jax.default_matmul_precision("highest"):
        here = _gradients_and_metrics(config, "blur", sizes, jax.devices()[:1])
        there = _gradients_and_metrics(config, "blur", sizes, jax.devices("cpu")[:1])
    error = max(_apart(a, b) for a, b in zip(here, there, strict=True))
    return {"error": error, "allowed": 1e-3}


def _bfloat16_error(config, sizes: shared.Sizes) -> dict[str, float]:
    low = dataclasses.replace(config, compute_dtype=shared.BFLOAT16)
    here = _gradients_and_metrics(low, "npo", sizes, jax.devices()[:1], steps=0)
    cpus = jax.devices("cpu")[:1]
    there = _gradients_and_metrics(config, "npo", sizes, cpus, steps=0)
    return {"error": _apart(here[0], there[0]), "allowed": 0.1}


def _gradients_and_metrics(config, name, sizes, devices, steps=3):
    """(gradients of every term, metrics after some steps), as host arrays."""
    model = models.make(config)
    mesh = sharding.make_mesh(devices=devices)
    # The same values on both platforms: made on the CPU.
    with jax.default_device(jax.devices("cpu")[0]):
        params = jax.jit(model.init)(jax.random.key(0))
        key = jax.random.key(1)
    params, key = jax.device_put((jax.device_get(params), key), devices[0])
    recipe = shared.recipe_of(model, name)
    streams = shared.random_streams(
        config, sizes._replace(rows=2, length=sizes.check_length)
    )
    step, state, frozen = recipe.setup(model, params, mesh=mesh, key=key)
    rows = sharding.put_rows(streams, mesh)

    @jax.jit
    def gradients(params, rows, key):
        return ju.term_gradients(recipe.terms, params, rows, ju.Frozen(), key)[1]

    with jax.set_mesh(mesh):
        grads = jax.device_get(gradients(state.params, rows, state.key))
    metrics = {}
    for _ in range(steps):
        state, metrics = step(state, streams, frozen)
    return grads, jax.device_get(metrics)


def _apart(a: Any, b: Any) -> float:
    """The largest |x - y| / |y| of two trees, by norms of leaves."""
    pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    norms = [
        (np.linalg.norm(np.asarray(x, np.float64) - y), np.linalg.norm(y))
        for x, y in ((x, np.asarray(y, np.float64)) for x, y in pairs)
    ]
    largest = max(size for _, size in norms)
    # Leaves whose gradient is 0 up to rounding are compared with the largest.
    return float(max(apart / max(size, 1e-4 * largest) for apart, size in norms))


def attention_is_right(run: Run) -> None:
    """Gradients with each kernel beside XLA's form, both in bfloat16."""
    kernels = [*KERNELS[jax.default_backend()]]
    if util.find_spec("tokamax"):
        kernels.append("tokamax")
    for kernel in kernels:
        for window in (None, run.sizes.check_length // 4):
            of = "all tokens" if window is None else f"a window of {window}"
            run.add(
                f"check attention {kernel} over {of}, left padding",
                partial(_attention_error, kernel, window, run.sizes),
            )


def _attention_error(
    kernel: str, window: int | None, sizes: shared.Sizes
) -> dict[str, float]:
    """Errors of gradients in bfloat16 against XLA's in float32.

    The kernel's may be half as large again as XLA's own in bfloat16.
    """
    config = shared.small_config(sizes)
    config = dataclasses.replace(config, windows=(window,) * config.layers)
    low = dataclasses.replace(config, compute_dtype=shared.BFLOAT16)
    if jax.default_backend() == "cpu":
        low = config
    length = sizes.check_length
    batch = shared.random_streams(config, sizes._replace(rows=2, length=length))[
        "retain"
    ]
    batch["mask"] = np.arange(length)[None] >= np.array([[0], [length // 3]])
    params = jax.jit(models.make(config).init)(jax.random.key(0))

    def gradient(config):
        model = models.make(config)
        term = terms.on_logps(losses.nll, model, "x", reduce="token")

        def loss(params, batch):
            total, _ = term(params, {"x": batch}, None, jax.random.key(0))
            return total.mean()

        return jax.device_get(jax.jit(jax.grad(loss))(params, batch))

    with jax.default_matmul_precision("highest"):
        wanted = gradient(dataclasses.replace(config, attention="xla"))
    plain = _apart(gradient(dataclasses.replace(low, attention="xla")), wanted)
    found = _apart(gradient(dataclasses.replace(low, attention=kernel)), wanted)
    return {"error": found, "allowed": 1.5 * plain + 1e-3, "xla": plain}


def one_b(run: Run) -> None:
    """Steps of 1B with float32 masters: methods and attention beside each other."""
    config = shared.sized_config("llama-3.2-1b", run.sizes, remat="mlp")
    for name in ("npo", "blur", "nll"):
        run.add(f"step 1b {name}", partial(shared.timed_step, config, name, run.sizes))
    plain = dataclasses.replace(config, attention="xla")
    run.add(
        "step 1b npo, xla attention",
        partial(shared.timed_step, plain, "npo", run.sizes),
    )
    if util.find_spec("tokamax"):
        for setting, part in (("attention", "attention"), ("unembed", "cross-entropy")):
            other = dataclasses.replace(config, **{setting: "tokamax"})
            name = f"step 1b npo, tokamax's {part}"
            run.add(name, partial(shared.timed_step, other, "npo", run.sizes))


def three_b(run: Run) -> None:
    """A step of 3B with float32 masters."""
    config = shared.sized_config("llama-3.2-1b", run.sizes, remat="mlp")
    if not run.sizes.tiny:
        shape = dict(width=3072, layers=28, heads=24, head_dim=128)
        config = dataclasses.replace(config, **shape)
    run.add("step 3b npo", partial(shared.timed_step, config, "npo", run.sizes))


def eight_b_int8(run: Run) -> None:
    """All of 8B with moments in 8 bits: float32 masters, then bfloat16 params.

    Compiled for a CPU, float32 compute included, the first needs 112 GiB.
    """
    config = shared.sized_config("llama-3.1-8b", run.sizes, remat="full")
    for dtype, rounding in (("float32", "nearest"), (shared.BFLOAT16, "stochastic")):
        settings = dict(rounding=rounding, moments="int8")
        step = partial(shared.timed_step, config, "npo", run.sizes, dtype, **settings)
        run.add(f"step 8b npo, {dtype} params, 8-bit moments", step)


def eight_b_offload(run: Run) -> None:
    """All of 8B: bfloat16 params, bfloat16 moments in the host's memory."""
    config = shared.sized_config("llama-3.1-8b", run.sizes, remat="full")
    settings = dict(rounding="stochastic", moments="bfloat16", host=sharding.HOST)
    name = "step 8b npo, bfloat16 params, moments in host memory"
    run.add(
        name,
        partial(
            shared.timed_step, config, "npo", run.sizes, shared.BFLOAT16, **settings
        ),
    )


def eight_b_lora(run: Run) -> None:
    """LoRA of rank 16 on all kernels of the blocks of 8B, bfloat16 base."""
    config = shared.sized_config("llama-3.1-8b", run.sizes, remat="full")
    name = "step 8b npo, LoRA of rank 16"
    rank = 4 if run.sizes.tiny else 16
    run.add(
        name,
        partial(
            shared.timed_step, config, "npo", run.sizes, shared.BFLOAT16, rank=rank
        ),
    )


def remat(run: Run) -> None:
    """The policies of recomputation on 1B."""
    for policy in ("full", "dots", "offload"):
        config = shared.sized_config("llama-3.2-1b", run.sizes, remat=policy)
        name = f"step 1b npo, remat {policy}"
        run.add(name, partial(shared.timed_step, config, "npo", run.sizes))


def torch(run: Run) -> None:
    """The same step of 1B in torch with bfloat16 autocast."""
    if util.find_spec("torch") is None or util.find_spec("transformers") is None:
        run.add("other torch", lambda: {"installed": "no"})
        return
    from experiments.benchmarks import torch_accelerator

    if not torch_accelerator.usable(run.sizes.tiny):
        run.add("other torch", lambda: {"installed": "without a GPU"})
        return
    config = shared.sized_config("llama-3.2-1b", run.sizes, remat="none")
    streams = shared.random_streams(config, run.sizes)
    measure = partial(
        torch_accelerator.measure, config, streams, shared.STEPS, shared.WARM_UP
    )
    run.add("step torch 1b npo", measure)


def generate(run: Run) -> None:
    """Greedy continuation of a batch of prompts by 1B in bfloat16."""
    run.add("other generate", partial(_generate, run.sizes))


def _generate(sizes: shared.Sizes) -> dict[str, float]:
    config = shared.sized_config("llama-3.2-1b", sizes, remat="none")
    model, mesh = models.make(config), sharding.make_mesh()
    params = shared.random_params(model, mesh, shared.BFLOAT16)
    count = max(sizes.prompts, sizes.rows)
    prompts = sizes._replace(rows=count, length=sizes.prompt_length)
    batch = shared.random_streams(config, prompts)["retain"]
    with jax.set_mesh(mesh):
        rows = sharding.put_rows(batch, mesh)
        call = partial(
            ju.generate, model, params, rows, max_new_tokens=sizes.new_tokens
        )
        start = time.perf_counter()
        jax.block_until_ready(call())
        first = time.perf_counter() - start
        seconds = shared.median_seconds(call, 3, 0)
    return {
        "prompts": count,
        "new_tokens_per_second": count * sizes.new_tokens / seconds,
        "seconds": seconds,
        "first_seconds": first,
        "peak_GiB": shared.memory_stats().get("peak_bytes_in_use", 0) / 2**30,
    }


def relearn(run: Run) -> None:
    """The attack by relearning on 1B, twice on equal shapes."""
    run.add("other relearn", partial(_relearn, run.sizes))


def _relearn(sizes: shared.Sizes) -> dict[str, float]:
    config = shared.sized_config("llama-3.2-1b", sizes, remat="mlp")
    model = models.make(config)
    params = jax.jit(model.init)(jax.random.key(0))
    shape = sizes._replace(rows=sizes.facts, length=min(64, sizes.length))
    table = {
        k: np.asarray(x)
        for k, x in shared.random_streams(config, shape)["retain"].items()
    }
    seconds, log = [], []
    for _ in range(2):
        start = time.perf_counter()
        after, log = attacks.relearn(
            model, params, table, steps=sizes.attack_steps, batch_size=2
        )
        jax.block_until_ready(after)
        seconds.append(time.perf_counter() - start)
        del after
    return {
        "first_seconds": seconds[0],
        "second_seconds": seconds[1],
        "last_loss": float(log[-1]["known/loss"]),
        "steps": sizes.attack_steps,
    }


def _brief(line: Mapping[str, Any]) -> str:
    shown = [f"{k} {v:.4g}" for k, v in line.items() if isinstance(v, int | float)]
    return line.get("failed") or ", ".join(shown[:5])


SECTIONS: Mapping[str, Callable[[Run], None]] = {
    "device": device,
    "step_is_right": step_is_right,
    "attention_is_right": attention_is_right,
    "1b": one_b,
    "8b_int8": eight_b_int8,
    "8b_lora": eight_b_lora,
    "3b": three_b,
    "torch": torch,
    "generate": generate,
    "relearn": relearn,
    "8b_offload": eight_b_offload,
    "remat": remat,
}
