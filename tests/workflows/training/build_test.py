# SPDX-License-Identifier: Apache-2.0
"""A config becomes the pieces of a run, from shapes alone, or a clear refusal."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec as P

from experiments.configs import capitals, llama31_8b, tiny
from jaxunlearn import trees
from jaxunlearn.workflows.training import build, settings


def config_of(**mesh):
    config = settings.check(tiny.get_config())
    config.mesh.update(mesh)
    return config


def test_the_step_lowers_from_shapes_alone():
    built = build.pieces(config_of(data=2, fsdp=2, tensor=2))
    kernel = built.state.params["blocks"]["mlp"]["up"]["kernel"]
    assert kernel.sharding.spec == P(None, "fsdp", "tensor")
    assert built.streams["forget"]["ref_logps"].shape == (8,)
    assert "ref_logps" not in built.streams["retain"]
    with jax.numpy_dtype_promotion("standard"):  # optax's Adam needs it
        lowered = built.step.lower(built.state, built.streams, built.frozen)
    state, metrics = lowered.out_info
    assert jax.tree.map(lambda x: (x.shape, x.dtype), state) == jax.tree.map(
        lambda x: (x.shape, x.dtype), built.state
    )
    assert {"forget/loss", "finite"} <= set(metrics)


def test_rounding_reaches_the_optimizer_and_is_placed_on_the_mesh():
    config = config_of(data=2, fsdp=2, tensor=2)
    config.model.dtype, config.rounding = "bfloat16", "masters"
    plain = build.pieces(config_of(data=2, fsdp=2, tensor=2))
    built = build.pieces(settings.check(config))
    assert built.state.params["embed"]["embedding"].dtype == jnp.bfloat16
    master = built.state.opt_state.masters["blocks/mlp/up/kernel"]
    assert master.dtype == jnp.float32 and master.sharding.spec == P(
        None, "fsdp", "tensor"
    )
    assert {x.dtype for x in jax.tree.leaves(built.state.opt_state)} == {
        x.dtype for x in jax.tree.leaves(plain.state.opt_state)
    }
    with jax.numpy_dtype_promotion("standard"):
        built.step.trace(built.state, built.streams, built.frozen)


def test_small_moments_reach_the_optimizer_with_the_rounding_of_params():
    config = config_of(data=2, fsdp=2, tensor=2)
    config.model.fields.update(vocab=512)
    config.model.dtype, config.rounding, config.moments = (
        *("bfloat16", "stochastic"),
        "int8",
    )
    built = build.pieces(settings.check(config))
    leaves = trees.paths(built.state.opt_state)
    codes = [x for path, x in leaves.items() if path.endswith("nu/embed/embedding")]
    dtypes = {str(x.dtype): x.sharding.spec for x in codes}
    assert dtypes == {"uint8": P("tensor", "fsdp"), "float32": P("tensor", None)}
    with jax.numpy_dtype_promotion("standard"):
        built.step.trace(built.state, built.streams, built.frozen)


def test_a_schedule_and_a_trainable_pattern_reach_the_recipe():
    config = config_of()
    config.recipe.trainable = "blocks/mlp/down/kernel"
    config.schedule.update(warmup=2, steps=10)
    built = build.pieces(config)
    assert len(jax.tree.leaves(built.state.params)) == 1
    assert built.frozen.params["blocks"]["mlp"]["down"]["kernel"] is None
    counts = [x for x in jax.tree.leaves(built.state.opt_state) if x.shape == ()]
    assert len(counts) > 2  # the schedule counts too


def test_finetuning_is_a_recipe_like_any_other():
    config = config_of()
    config.mode, config.recipe.name = "finetune", "finetune.nll"
    config.recipe.args = dict(streams=dict(forget=1.0, retain=0.5))
    streams = build.pieces(settings.check(config)).streams
    assert set(streams) == {"forget", "retain"}
    assert "ref_logps" not in streams["forget"]


@pytest.mark.parametrize("file", [capitals, llama31_8b])
def test_shipped_configs_pass_the_check(file):
    settings.check(file.get_config())


WRONG = {
    "Did you mean 'save_every'": lambda c: c.update(save_evry=3),
    "mode='unlern'.*Did you mean 'unlearn'": lambda c: c.update(mode="unlern"),
    "argument='gama'. Did you mean 'gamma'": lambda c: c.recipe.args.update(gama=1),
    "name='blur.nop'. Did you mean 'blur.npo'": lambda c: c.recipe.update(
        name="blur.nop"
    ),
    "'forget'.*key='lenght'": lambda c: c.data.forget.update(lenght=3),
    "'forget'.*rows=None": lambda c: c.data.forget.update(rows=None),
    "source='tofoo'": lambda c: c.data.forget.update(source="tofoo"),
    "field='wdith'": lambda c: c.model.fields.update(wdith=3),
    "model.path.*got both": lambda c: c.model.update(path="x"),
    "mode='finetune' needs a recipe, one in finetune": lambda c: c.update(
        mode="finetune"
    ),
    "rounding='up'": lambda c: c.update(rounding="up"),
    "moments='int4'.*'int8'": lambda c: c.update(moments="int4"),
    "steps >= 0, got steps=-1": lambda c: c.update(steps=-1),
    "output folder, got none": lambda c: c.update(output=""),
    "stream 'retain', but there is 'forget'": lambda c: c.data.__delitem__("retain"),
    "number of devices, 8, got data=3": lambda c: c.mesh.update(data=3, fsdp=1),
    "= 8, got 6 rows": lambda c: c.data.forget.update(rows=6),
}


@pytest.mark.parametrize("message", WRONG)
def test_a_wrong_config_is_refused_with_the_next_move(message):
    config = tiny.get_config()
    with config.unlocked():
        WRONG[message](config)
    with pytest.raises((ValueError, TypeError, KeyError), match=message):
        build.pieces(settings.check(config))
