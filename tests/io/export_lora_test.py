# SPDX-License-Identifier: Apache-2.0
"""Merged LoRA leaves, saved, are what transformers computes."""

import jax
import pytest

from jaxunlearn import trees, wrap
from jaxunlearn.io import hf

transformers = pytest.importorskip("transformers")


def test_a_merged_model_opens_in_transformers(torch_model, same_logits, tmp_path):
    torch_model("llama").save_pretrained(tmp_path / "theirs")
    model, params, _ = hf.load(tmp_path / "theirs")
    low = wrap.lora(model, pattern=r"blocks/.*/kernel", rank=2)
    wrapped = trees.map_with_path(
        lambda path, x: x + 0.1 if path.endswith("lora_b") else x,
        wrap.add_lora(low, params, jax.random.key(0)),
    )
    with pytest.raises(ValueError, match="lora_a"):
        hf.save(low, wrapped, tmp_path / "ours")
    hf.save(low, wrap.merge_lora(low, wrapped), tmp_path / "ours")
    again = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "ours", attn_implementation="eager"
    )
    same_logits(low, wrapped, again)
