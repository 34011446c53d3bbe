# SPDX-License-Identifier: Apache-2.0
"""What the sections of `accelerator` share: sizes, random models and a timed step."""

import dataclasses
import statistics
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxunlearn import models, plan, recipes, sharding, wrap
from jaxunlearn.workflows.training import presets

BFLOAT16, STEPS, WARM_UP = "bfloat16", 5, 2


class Sizes(NamedTuple):
    """Shapes of a run.

    Attributes:
        rows: of each of the two streams, at least one for each device.
        length: tokens of a row.
        matmul: side of the square product.
        prompts, prompt_length, new_tokens: of generation.
        facts, attack_steps: of the attack.
        check_width, check_length: width and length of the model that is compared.
        tiny: whether every model is a tiny one.
    """

    rows: int = 4
    length: int = 1024
    matmul: int = 8192
    prompts: int = 64
    prompt_length: int = 64
    new_tokens: int = 64
    facts: int = 30
    attack_steps: int = 10
    check_width: int = 256
    check_length: int = 256
    tiny: bool = False


TINY = Sizes(2, 16, 128, 2, 8, 4, 4, 2, 32, 16, tiny=True)


def timed_step(
    config: models.DecoderConfig,
    name: str,
    sizes: Sizes,
    dtype: str = "float32",
    *,
    rank: int = 0,
    **settings,
) -> dict[str, Any]:
    """Time, memory and MFU of a step; see `Recipe.setup` for the settings."""
    model, mesh = models.make(config), sharding.make_mesh()
    params = random_params(model, mesh, dtype)
    if rank:
        model = wrap.lora(model, pattern=r"blocks/.*/kernel", rank=rank)
        # On the mesh by the rules of the leaves that are new.
        params = wrap.add_lora(model, params, jax.random.key(2))
    recipe = recipe_of(model, name)
    streams = sharding.put_rows(random_streams(config, sizes), mesh)
    step, state, frozen = recipe.setup(model, params, mesh=mesh, **settings)
    del params
    start = time.perf_counter()
    compiled = step.lower(state, streams, frozen).compile()
    compile_seconds = time.perf_counter() - start
    seconds = []
    for _ in range(WARM_UP + STEPS):
        start = time.perf_counter()
        state, metrics = jax.block_until_ready(compiled(state, streams, frozen))
        seconds.append(time.perf_counter() - start)
    if not bool(metrics["finite"]):
        raise ArithmeticError("a loss or a gradient of the step is not finite")
    middle = statistics.median(seconds[WARM_UP:])
    needed = plan.model_flops(model, state.params, frozen.params, recipe.terms, streams)
    peak = plan.peak_flops(jax.devices())
    loss = {k: float(v) for k, v in metrics.items() if k.endswith("/loss")}
    return {
        "seconds": middle,
        "seconds_all": seconds[WARM_UP:],
        "tokens_per_second": _tokens(streams, recipe) / middle,
        "model_flops": needed,
        "mfu": None if peak is None else needed / (middle * peak),
        "peak": memory_stats().get("peak_bytes_in_use"),
        "compiled_peak": _compiled_peak(compiled),
        "compile_seconds": compile_seconds,
        "attention": config.attention,
        **loss,
    }


def _tokens(streams, recipe) -> int:
    return sum(streams[name]["tokens"].size for name in recipe.reads())


def _compiled_peak(compiled) -> float | None:
    sizes = compiled.memory_analysis()
    if sizes is None:
        return None
    return float(
        sizes.argument_size_in_bytes
        + sizes.output_size_in_bytes
        - sizes.alias_size_in_bytes
        + sizes.temp_size_in_bytes
    )


def recipe_of(model, name: str) -> recipes.Recipe:
    if name == "blur":
        return recipes.blur.npo(model, gamma=0.1)
    if name == "nll":
        streams = {"forget": 1.0, "retain": 1.0}
        return recipes.finetune.nll(model, streams=streams)
    return recipes.openunlearning.npo(model, clip=None, weight_decay=0.01)


def random_params(model, mesh, dtype: str):
    """Random params of a dtype, made in their shards on the devices."""

    def make(key):
        return jax.tree.map(lambda x: x.astype(dtype), model.init(key))

    return sharding.create(make, mesh, model.rules, jax.random.key(0))


def random_streams(config: models.DecoderConfig, sizes: Sizes) -> dict[str, dict]:
    """Random tokens; the reference is what a model that knows nothing gives."""
    rng = np.random.default_rng(0)
    shape = (sizes.rows, sizes.length)
    streams = {
        name: {
            "tokens": rng.integers(0, config.vocab, shape).astype(np.int32),
            "mask": np.ones(shape, np.bool_),
        }
        for name in ("forget", "retain")
    }
    guess = -(sizes.length - 1) * np.log(config.vocab)
    streams["forget"]["ref_logps"] = np.full(sizes.rows, guess, np.float32)
    return streams


def small_config(sizes: Sizes) -> models.DecoderConfig:
    """The model of the comparisons, float32."""
    width = sizes.check_width
    return models.DecoderConfig(
        family="llama",
        vocab=16 * width if not sizes.tiny else 64,
        width=width,
        layers=4 if not sizes.tiny else 2,
        heads=4,
        kv_heads=2,
        head_dim=width // 4,
        hidden=3 * width,
        positions=sizes.check_length,
        compute_dtype="float32",
    )


def sized_config(preset: str, sizes: Sizes, remat: str) -> models.DecoderConfig:
    """A preset with the attention kernel of the platform, or a tiny model."""
    if sizes.tiny:
        return dataclasses.replace(
            small_config(sizes), remat=remat, compute_dtype=BFLOAT16
        )
    config = presets.PRESETS[preset]
    return dataclasses.replace(config, attention="auto", remat=remat)


def median_seconds(
    function: Callable[[], Any], count: int = 5, warm_up: int = 1
) -> float:
    """Median seconds of a call; some calls come before."""
    seconds = []
    for _ in range(warm_up + count):
        start = time.perf_counter()
        jax.block_until_ready(function())
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds[warm_up:])


def memory_stats() -> dict[str, float]:
    """Memory of the first device; empty where the platform does not say."""
    return jax.devices()[0].memory_stats() or {}
