# SPDX-License-Identifier: Apache-2.0
"""Folders of models that did not come from a file: token ids fit the vocabulary."""

import dataclasses
import json

import jax
import pytest

from jaxunlearn import models
from jaxunlearn.io import hf

SMALL = {  # settings of a model that did not come from a file
    "vocab": 16,
    "width": 16,
    "layers": 1,
    "heads": 2,
    "kv_heads": 2,
    "head_dim": 8,
    "hidden": 16,
    "positions": 32,
}
_BIASES = {"qkv_bias": True, "out_bias": True, "mlp_bias": True, "norm": "layer"}
_GPT = {**_BIASES, "gated": False, "rope": None, "norm_eps": 1e-5}
NEW = {
    "gpt2": {**_GPT, "activation": "gelu_tanh", "tied": True},
    "opt": {**_GPT, "activation": "relu", "tied": True, "position_offset": 2},
    "olmo": {"norm": "layer_unscaled", "norm_eps": 1e-5},
    "gemma2": {
        "norm": "rms_plus_one",
        "post_norms": True,
        "activation": "gelu_tanh",
        "tied": True,
        "embed_scale": 4.0,
        "attention_scale": 8**-0.5,
    },
}


@pytest.mark.parametrize("family", ["phi3", "smollm3", "gpt2", "olmo", "opt", "gemma2"])
def test_a_new_model_with_a_small_vocabulary_opens_in_transformers(tmp_path, family):
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("torch")
    settings = SMALL | NEW.get(family, {})
    model = models.make(models.DecoderConfig(family=family, **settings))
    hf.save(model, model.init(jax.random.key(0)), tmp_path)
    opened = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert opened.config.vocab_size == 16
    for config in (opened.config, opened.generation_config):
        for name in ("bos", "eos", "pad"):
            assert getattr(config, f"{name}_token_id") is None


def test_a_new_model_has_the_ids_of_its_tokenizer(tiny, tmp_path):
    model, params = tiny

    class Ids:
        bos_token_id, eos_token_id, pad_token_id = 0, 5, 64  # 64 rows: no id 64

        def save_pretrained(self, folder):
            pass

    hf.save(model, params, tmp_path, tokenizer=Ids())
    for name in ("config.json", "generation_config.json"):
        found = json.loads((tmp_path / name).read_text())
        assert (found["bos_token_id"], found["eos_token_id"]) == (0, 5)
        assert found.get("pad_token_id") is None
    ends = dataclasses.replace(model.config, eos_ids=(7,))
    hf.save(models.make(ends), params, tmp_path, tokenizer=Ids())
    assert hf.model_from_config(tmp_path).config.eos_ids == (7,)
