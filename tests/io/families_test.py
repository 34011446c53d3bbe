# SPDX-License-Identifier: Apache-2.0
"""Families beyond Llama compute what transformers computes, and refuse the rest."""

import dataclasses
import json
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from jaxunlearn import models, sharding, trees
from jaxunlearn.io import _families, _hf_config, hf
from tests.io.conftest import DROP
from tests.io.parity_test import compare

THREE = {"num_hidden_layers": 3, "head_dim": 12}
MIXED = ["sliding_attention", "full_attention", "sliding_attention"]
PLAIN = dict.fromkeys(("num_key_value_heads", "intermediate_size"), DROP)
CASES = {
    "gemma": ("gemma", {"head_dim": 12, "attention_bias": True}),
    "gemma2": (
        "gemma2",
        THREE
        | {"query_pre_attn_scalar": 20, "sliding_window": 7}
        | {"attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0},
    ),
    "gemma3": (
        "gemma3_text",
        THREE
        | {"layer_types": MIXED, "sliding_window": 7, "shards": "30KB"}
        | {"query_pre_attn_scalar": 10},
    ),
    "gemma3-linear": (
        "gemma3_text",
        THREE
        | {"layer_types": MIXED, "sliding_window": 5}
        | {"rope_scaling": {"rope_type": "linear", "factor": 8.0}},
    ),
    "phi3-longrope": (
        "phi3",
        {
            "original_max_position_embeddings": 32,
            "partial_rotary_factor": 0.5,
            "rope_scaling": {
                "type": "longrope",
                "short_factor": [1.0, 1.5],
                "long_factor": [2.0, 3.0],
            },
        },
    ),
    "gpt2": ("gpt2", PLAIN | {"n_inner": 40, "shards": "30KB"}),
    "gpt2-unscaled": (
        "gpt2",
        PLAIN | {"scale_attn_weights": False, "tie_word_embeddings": False},
    ),
    "opt": ("opt", PLAIN | {"ffn_dim": 40, "word_embed_proj_dim": 32}),
    "opt-unbiased": (
        "opt",
        PLAIN
        | {"ffn_dim": 40, "word_embed_proj_dim": 32}
        | {"enable_bias": False, "activation_function": "gelu"},
    ),
    "neox": ("gpt_neox", {"num_key_value_heads": DROP, "shards": "30KB"}),
    "neox-in-turn": (
        "gpt_neox",
        {"num_key_value_heads": DROP, "use_parallel_residual": False}
        | {"rotary_pct": 1.0, "attention_bias": False, "rotary_emb_base": 500},
    ),
    "olmo": ("olmo", {"clip_qkv": 1.0, "shards": "20KB"}),
    "olmo-tied": (
        "olmo",
        {"tie_word_embeddings": True, "attention_bias": True, "num_key_value_heads": 1},
    ),
    "olmo2": ("olmo2", {"num_hidden_layers": 3}),
    "olmo2-tied": (
        "olmo2",
        {"tie_word_embeddings": True, "attention_bias": True, "rms_norm_eps": 1e-3}
        | {"num_key_value_heads": 4},
    ),
    "phi": ("phi", {"shards": "20KB", "num_key_value_heads": 4}),
    "phi-normed": (
        "phi",
        {"qk_layernorm": True, "tie_word_embeddings": True, "num_key_value_heads": 1}
        | {"partial_rotary_factor": 1.0, "hidden_act": "gelu"},
    ),
    "smollm3": ("smollm3", {"num_hidden_layers": 4, "tie_word_embeddings": False}),
    "smollm3-windows": (
        "smollm3",
        {"num_hidden_layers": 3, "no_rope_layers": [0, 1, 0], "sliding_window": 5}
        | {"use_sliding_window": True, "attention_bias": True, "mlp_bias": True},
    ),
    "olmo3": (
        "olmo3",
        {"num_hidden_layers": 4, "sliding_window": 7}
        | {"rope_scaling": {"rope_type": "yarn", "factor": 4.0}},
    ),
    "ministral": ("ministral", THREE | {"layer_types": MIXED, "sliding_window": 7}),
    "granite": (
        "granite",
        {"embedding_multiplier": 3.0, "attention_multiplier": 0.3, "mlp_bias": True}
        | {"residual_multiplier": 0.4, "logits_scaling": 2.5, "attention_bias": True},
    ),
    "glm": ("glm", {"head_dim": 12, "attention_bias": True}),
    "glm4": ("glm4", {"head_dim": 8, "partial_rotary_factor": 1.0}),
    "seed_oss": ("seed_oss", {"head_dim": 12, "attention_out_bias": True}),
}


@pytest.fixture(scope="session")
def made(torch_model):
    """The config.json of a case and nothing else."""

    def make(case):
        family, settings = CASES[case]
        settings = {name: v for name, v in settings.items() if name != "shards"}
        return torch_model(family, **settings)

    return make


# Cases that add little to the others; CI runs them.
SLOW = (
    "olmo-tied",
    "olmo2-tied",
    "phi-normed",
    "smollm3",
    "ministral",
    "glm",
    "seed_oss",
    "olmo3",
)
MARKED = [pytest.param(x, marks=[pytest.mark.slow] if x in SLOW else []) for x in CASES]


@pytest.mark.parametrize("case", MARKED)
@pytest.mark.slow
def test_families(torch_model, same_logits, tmp_path, case):
    family, settings = CASES[case]
    model, _ = compare(torch_model, same_logits, tmp_path, family, **settings)
    _, params, _ = hf.load(tmp_path / "ours")
    bare = dataclasses.replace(model.config, source="{}")
    text = _hf_config.write(bare, "float32")
    assert dataclasses.replace(_hf_config.parse(text), source="{}") == bare

    # A cache gives what one pass gives.
    mask = np.ones((3, 40), bool)  # the shape of same_logits, whose program is reused
    mask[1, :4] = False
    tokens = np.random.default_rng(1).integers(0, 96, mask.shape).astype(np.int32)
    batch = {"tokens": jnp.asarray(tokens), "mask": jnp.asarray(mask)}
    apply, extend = jax.jit(model.apply), jax.jit(model.decode)
    expected = apply(params, batch).hidden[mask]
    longest = {} if model.config.cache_limit is None else {"min_length": 40}
    cache, pieces = model.init_cache(3, 40, **longest), []
    for first in (0, 20):
        piece = {name: x[:, first : first + 20] for name, x in batch.items()}
        hidden, cache = extend(params, piece, cache)
        pieces.append(hidden)
    got = jnp.concatenate(pieces, axis=1)[mask]
    np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-4)

    # Every leaf has a rule, and a unit set to zero is its row of the consumer's.
    mesh = sharding.make_mesh(fsdp=1, devices=jax.devices()[:1])
    sharding.by_rules(params, mesh, model.rules)

    def zero(value, layer):
        return jnp.where(layer == 1, value.at[..., 3].set(0.0), value)

    consumers = [model.sites[name].reader for name in ("attention", "mlp")]
    pruned = trees.map_with_path(
        lambda path, x: x.at[1, 3].set(0.0) if path in consumers else x, params
    )
    both = jax.jit(partial(model.apply, edits={"attention": zero, "mlp": zero}))
    edited = both(params, batch).hidden[mask]
    want = apply(pruned, batch).hidden[mask]
    np.testing.assert_allclose(edited, want, rtol=1e-4, atol=1e-4)
    assert not np.allclose(edited, expected, atol=1e-4)


def test_models_with_new_settings_can_be_created_and_trained():
    """Fresh norms scale by one, whatever is stored, and every leaf has a gradient."""
    for family, settings in {
        "gemma3_text": {"norm": "rms_plus_one", "post_norms": True, "qk_norm": True},
        "gpt2": {"norm": "layer", "gated": False, "rope": None, "mlp_bias": True},
    }.items():
        sizes = dict(vocab=32, width=16, layers=2, heads=4, kv_heads=4, head_dim=4)
        config = models.DecoderConfig(
            family=family, hidden=24, positions=64, **(sizes | settings)
        )
        model = models.make(config)
        params = model.init(jax.random.key(0))
        stored = 0.0 if config.norm == "rms_plus_one" else 1.0
        scales = [x for p, x in trees.paths(params).items() if p.endswith("scale")]
        assert all(bool(jnp.all(x == stored)) for x in scales)
        tokens = jnp.arange(12, dtype=jnp.int32)[None]
        batch = {"tokens": tokens, "mask": jnp.ones((1, 12), jnp.bool_)}

        def loss(params, model=model, batch=batch):
            hidden = model.apply(params, batch).hidden
            return jnp.sum(jnp.sin(model.unembed(params, hidden)))

        for path, grad in trees.paths(jax.jit(jax.grad(loss))(params)).items():
            assert bool(jnp.any(grad != 0)), path


def test_transformers_4_and_5_spell_the_same_gemma3(made):
    new = json.loads(made("gemma3").config.to_json_string(use_diff=False))
    rope = new["rope_parameters"]
    old = {n: v for n, v in new.items() if n not in ("rope_parameters", "layer_types")}
    old |= {
        "sliding_window_pattern": 2,  # sliding, full, sliding
        "rope_theta": rope["full_attention"]["rope_theta"],
        "rope_local_base_freq": rope["sliding_attention"]["rope_theta"],
        "rope_scaling": None,
    }
    one, other = (
        dataclasses.replace(_hf_config.parse(json.dumps(given)), source="{}")
        for given in (new, old)
    )
    assert one == other
    assert one.windows == (7, None, 7)
    assert (one.rope.theta, one.local_rope.theta) == (1e6, 1e4)


def test_transformers_4_and_5_spell_the_same_neox(made):
    new = json.loads(made("neox-in-turn").config.to_json_string(use_diff=False))
    old = {name: v for name, v in new.items() if name != "rope_parameters"}
    old |= {"rotary_pct": 1.0, "rotary_emb_base": 500, "rope_scaling": None}
    one, other = (
        dataclasses.replace(_hf_config.parse(json.dumps(given)), source="{}")
        for given in (new, old)
    )
    assert one == other
    assert (one.rope.theta, one.rope.partial) == (500.0, 1.0)


@pytest.mark.parametrize("case", ["gpt2", "neox"])
def test_older_files_have_other_names(made, same_logits, tmp_path, case):
    """Without the first part, and with the masks that were saved as buffers."""
    reference = made(case)
    reference.save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = safetensors.numpy.load_file(file)
    if case == "gpt2":
        tensors = {n.removeprefix("transformer."): x for n, x in tensors.items()}
        tensors["h.0.attn.bias"] = np.ones((1, 1, 8, 8), np.float32)
    else:
        tensors["lm_head.weight"] = tensors.pop("embed_out.weight")
        tensors["gpt_neox.layers.0.attention.bias"] = np.ones((1, 1, 8, 8), np.float32)
    safetensors.numpy.save_file(tensors, file)
    model, params, _ = hf.load(tmp_path)
    same_logits(model, params, reference, sides=("left",))


@pytest.mark.parametrize(
    ("family", "settings", "parts"),
    [
        ("opt", {"do_layer_norm_before": False}, ["do_layer_norm_before", "False"]),
        ("opt", {"word_embed_proj_dim": 16}, ["word_embed_proj_dim", "32", "16"]),
        ("opt", {"_remove_final_layer_norm": True}, ["_remove_final_layer_norm"]),
        ("opt", {"activation_function": "tanh"}, ["activation_function", "'relu'"]),
        ("opt", {"layer_norm_elementwise_affine": False}, ["elementwise_affine"]),
        ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, ["inverse_layer_idx"]),
        ("gpt2", {"add_cross_attention": True}, ["add_cross_attention"]),
        ("gemma2", {"use_bidirectional_attention": True}, ["bidirectional"]),
        ("gemma3_text", {"rope_parameters": {"factor": 2.0}}, ["rope_parameters"]),
        ("gemma3_text", {"sliding_window": None}, ["layer_types", "window size"]),
        ("gemma3", {}, ["model_type", "'gemma3'", "'gemma3_text'"]),
        ("phi3", {"rope_scaling": {"type": "mrope"}}, ["rope_type", "'mrope'"]),
        ("olmo", {"partial_rotary_factor": 0.5}, ["partial_rotary_factor", "0.5"]),
        ("olmo3", {"rope_theta": 1e4}, ["rope_theta", "10000.0", "rope_parameters"]),
        ("smollm3", {"no_rope_layers": [1]}, ["no_rope_layers", "[1]"]),
        ("qwen3_5", {}, ["'qwen3_5'", "nearest family is 'qwen3'", "linear attention"]),
        ("llama4", {}, ["'llama4'", "nearest family is 'llama'", "chunked attention"]),
        ("gemma4_text", {}, ["nearest family is 'gemma3_text'", "per layer"]),
        ("hf_olmo", {}, ["nearest family is 'olmo'", "-hf"]),
        ("cohere", {}, ["nearest family is 'llama'", "parallel blocks"]),
    ],
    ids=str,
)
def test_unsupported_variants_are_refused(mentions, family, settings, parts):
    base = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 3}
    base |= {"num_attention_heads": 4, "intermediate_size": 48, "model_type": family}
    names = _families.FAMILIES[family].names if family in _families.FAMILIES else {}
    base = {names.get(name, name): value for name, value in base.items()}
    if settings:
        _hf_config.parse(json.dumps(base))  # loads without the setting
    with pytest.raises(ValueError) as info:
        _hf_config.parse(json.dumps(base | settings))
    mentions(
        info, "hf.load needs", "got", "models.from_nnx" if settings else "", *parts
    )
