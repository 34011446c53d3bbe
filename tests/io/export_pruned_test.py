# SPDX-License-Identifier: Apache-2.0
"""Pruned checkpoints, as they are or smaller, are what transformers computes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxunlearn import edits, models
from jaxunlearn.io import hf
from tests.io.families_test import PLAIN

pytestmark = pytest.mark.slow  # nearly every test compiles a model

transformers = pytest.importorskip("transformers")

CASES = {
    "gpt2": PLAIN | {"n_inner": 40},
    "opt": PLAIN | {"ffn_dim": 40, "word_embed_proj_dim": 32},
    "qwen3": {"head_dim": 12},
}


@pytest.mark.parametrize("family", CASES)
def test_a_pruned_model_opens_in_transformers(
    torch_model, same_logits, tmp_path, family
):
    torch_model(family, **CASES[family]).save_pretrained(tmp_path / "theirs")
    model, params, _ = hf.load(tmp_path / "theirs")
    keys = jax.random.split(jax.random.key(0))
    gone = {
        name: edits.select_units(
            jax.random.uniform(key, (2, model.sites[name].units)), 0.3, per_layer=True
        )
        for name, key in zip(("mlp", "attention"), keys, strict=True)
    }
    pruned = edits.prune_units(model, params, gone)
    tokens = jnp.arange(24).reshape(2, 12)
    batch = {"tokens": tokens, "mask": tokens >= 0}
    masks = {
        name: lambda value, layer, mask=mask: jnp.where(mask[layer], 0, value)
        for name, mask in gone.items()
    }
    wanted = model.unembed(params, model.apply(params, batch, edits=masks).hidden)
    found = model.unembed(params, model.apply(pruned, batch).hidden)
    scale = np.abs(wanted).max()
    np.testing.assert_allclose(found, wanted, atol=1e-5 * max(scale, 1.0))

    small = edits.remove_units(model, pruned, {"mlp": gone["mlp"]})
    smaller = models.resized(model, small)
    assert smaller.config.hidden < model.config.hidden
    for name, saved in {
        "pruned": (model, pruned),
        "smaller": (smaller, small),
    }.items():
        hf.save(*saved, tmp_path / name)
        again = transformers.AutoModelForCausalLM.from_pretrained(
            tmp_path / name, attn_implementation="eager"
        )
        same_logits(model, pruned, again)
