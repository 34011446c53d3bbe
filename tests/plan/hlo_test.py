# SPDX-License-Identifier: Apache-2.0
"""Bytes of collectives: on texts compiled for eight devices, and on hand-made lines."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jaxunlearn import plan, sharding

LOOP = """
%add (a: f32[], b: f32[]) -> f32[] {
  ROOT %s = f32[] add(%a, %b)
}
%body (p: (s32[], f32[8])) -> (s32[], f32[8]) {
  %r = f32[1024]{0} all-reduce(%x), replica_groups={{0,1,2,3},{4,5,6,7}}, to_apply=%add
}
%cond (p: (s32[], f32[8])) -> pred[] {
  %c = s32[]{:T(128)} constant(5)
  ROOT %lt = pred[] compare(%i, %c), direction=LT
}
%heavy (p: (f32[8])) -> f32[8] {
  %g = f32[4096]{0} all-gather(%x), replica_groups=[2,4]<=[8], dimensions={0}RARE
}
%light (p: (f32[8])) -> f32[8] {
  %g = f32[64]{0} all-gather(%x), replica_groups=[2,4]<=[8], dimensions={0}
}
%all-reduce-scatter.1 (p: f32[800]) -> f32[100] {
  %r = f32[800]{0} all-reduce(%p), replica_groups=mesh['a'=2,'b'=4] {'a','b'}
}
ENTRY %main (p: f32[8]) -> f32[8] {
  %w = (s32[], f32[8]{0:T(8)}, /*index=2*/f32[1]) while(%t), condition=%cond, body=%body
  %if = f32[8] conditional(%b, %p, %p), branch_computations={%heavy, %light}
  %f = f32[100] fusion(%p), kind=kCustom, calls=%all-reduce-scatter.1
  %cp = bf16[100] collective-permute(%p), source_target_pairs={{0,1},{1,0}}
}
"""


def test_loops_multiply_and_the_larger_branch_counts():
    moved = plan.collectives(LOOP.replace("RARE", ""))
    assert moved["all-reduce"] == (5, 5 * 2 * 4096 * 3 / 4)
    assert moved["all-gather"] == (1, 4 * 4096 * 3 / 4)
    assert moved["reduce-scatter"] == (1, 3200 * 7 / 8)
    assert moved["collective-permute"] == (1, 200)


def test_a_rare_branch_does_not_count():
    rare = ', metadata={op_name="jit(step)/cond/rare/reduce_max"}'
    moved = plan.collectives(LOOP.replace("RARE", rare))
    assert moved["all-gather"] == (1, 4 * 64 * 3 / 4)


def test_a_collective_split_over_fusions_counts_once():
    gather = "%g = f32[64]{0} all-gather(%p), replica_groups=[2,4]<=[8], channel_id="
    parts = "".join(
        f"%part.{i} (p: f32[16]) -> f32[64] {{\n  {gather}{channel}\n}}\n"
        for i, channel in enumerate((7, 7, 7, 8))
    )
    calls = "".join(
        f"  %f.{i} = f32[64] fusion(%p), calls=%part.{i}\n" for i in range(4)
    )
    text = parts + "ENTRY %main (p: f32[8]) -> f32[8] {\n" + calls + "}\n"
    assert plan.collectives(text) == {"all-gather": (2, 2 * 4 * 64 * 3 / 4)}


def test_a_loop_without_a_known_count_is_named():
    text = LOOP.replace("constant(5)", "parameter(0)")
    moved = plan.collectives(text)
    assert moved["unknown-loop"].count == 1 and moved["all-reduce"].count == 1


@pytest.mark.parametrize("layers", [2, 5])
def test_a_scan_gathers_each_layer(layers):
    mesh, width, rows = sharding.make_mesh(fsdp=8), 64, 2048
    cut = NamedSharding(mesh, P(None, "fsdp"))

    def forward(kernels, x):
        def body(x, kernel):
            kernel = sharding.constrain(kernel, None, None)
            x = sharding.constrain(jnp.tanh(x @ kernel), "fsdp", None)
            return x, None

        return jax.lax.scan(body, x, kernels)[0]

    kernels = jax.ShapeDtypeStruct((layers, width, width), jnp.float32, sharding=cut)
    sharded = NamedSharding(mesh, P("fsdp"))
    x = jax.ShapeDtypeStruct((rows, width), jnp.float32, sharding=sharded)
    with jax.set_mesh(mesh):
        text = jax.jit(forward).lower(kernels, x).compile().as_text()
    moved = plan.collectives(text)
    assert moved == {"all-gather": (layers, layers * width * width * 4 * 7 / 8)}
