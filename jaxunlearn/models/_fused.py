# SPDX-License-Identifier: Apache-2.0
"""Log-probabilities of targets without an array of logits, by the library tokamax."""

from functools import partial

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from jaxunlearn import _checks, sharding
from jaxunlearn.models._config import DecoderConfig
from jaxunlearn.sharding import BATCH
from jaxunlearn.typing import Array, Params


def target_logps(
    config: DecoderConfig, params: Params, hidden: Array, targets: Array
) -> Array:
    """log p of each target: tokamax's fused linear cross-entropy, negated.

    On TPUs that is a Pallas kernel; elsewhere tokamax computes the logits of all
    tokens. On a mesh each device has its rows and the complete kernel of the
    unembedding.

    Args:
        config: with unembed="tokamax".
        params: of the decoder.
        hidden: [B, L, D], after the final norm.
        targets: [B, L] int32.
    Returns:
        [B, L] float32, nats.
    Raises:
        ImportError: naming tokamax, if it is not installed.
        ValueError: if the unembedding has LoRA leaves.
    """
    tokamax = _checks.library("unembed='tokamax'", "tokamax", "tokamax")
    if "lora_a" in params.get("unembed", {}):
        raise ValueError(
            "unembed='tokamax' needs an unembedding without LoRA, got lora_a beside "
            "its kernel. Leave unembed/kernel out of wrap.lora's pattern."
        )
    dtype = jnp.dtype(config.compute_dtype)
    if config.tied:
        kernel = params["embed"]["embedding"].T
    else:
        kernel = params["unembed"]["kernel"]

    def run(hidden, targets, kernel):
        nll = tokamax.linear_softmax_cross_entropy_loss(
            hidden.reshape(-1, hidden.shape[-1]),
            targets.reshape(-1),
            kernel,
            reduction="none",
        )
        return -nll.astype(jnp.float32).reshape(targets.shape)

    hidden, kernel = hidden.astype(dtype), kernel.astype(dtype)
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return run(hidden, targets, kernel)
    rows = PartitionSpec(*sharding.spec(targets.shape[:1], BATCH))
    on_devices = partial(jax.shard_map, check_vma=False)
    specs = (rows, rows, PartitionSpec())
    return on_devices(run, in_specs=specs, out_specs=rows)(hidden, targets, kernel)
