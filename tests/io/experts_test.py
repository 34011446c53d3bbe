# SPDX-License-Identifier: Apache-2.0
"""Mixtures of experts compute what transformers computes, and refuse the rest."""

import dataclasses
import json
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import safetensors.numpy

import jaxunlearn as ju
from jaxunlearn import combine, losses, models, sharding, terms
from jaxunlearn.io import _hf_config, _names, hf
from jaxunlearn.workflows.training import presets
from tests.io.parity_test import compare

transformers = pytest.importorskip("transformers")

SIZES = {"num_experts_per_tok": 2, "moe_intermediate_size": 24}
CASES = {
    "mixtral": ("mixtral", {"num_local_experts": 5, "sliding_window": 9}),
    "mixtral-one": (
        "mixtral",
        {"num_local_experts": 3, "num_experts_per_tok": 1, "head_dim": 12}
        | {"tie_word_embeddings": True, "hidden_act": "gelu"},
    ),
    "qwen3": ("qwen3_moe", SIZES | {"num_experts": 6, "head_dim": 16}),
    "qwen3-normalized": (
        "qwen3_moe",
        SIZES
        | {"num_experts": 4, "num_experts_per_tok": 4, "norm_topk_prob": True}
        | {"attention_bias": True, "shards": "30KB", "head_dim": 8}
        | {"use_sliding_window": True, "sliding_window": 9},
    ),
    "qwen2": (
        "qwen2_moe",
        SIZES
        | {"num_experts": 4, "shared_expert_intermediate_size": 20}
        | {"use_sliding_window": True, "sliding_window": 9, "max_window_layers": 1},
    ),
    "granite": (
        "granitemoe",
        {"num_local_experts": 4, "num_experts_per_tok": 3, "attention_bias": True}
        | {"embedding_multiplier": 3.0, "attention_multiplier": 0.2}
        | {"residual_multiplier": 0.6, "logits_scaling": 0.7},
    ),
    "olmoe": ("olmoe", {"num_experts": 4, "num_experts_per_tok": 2, "clip_qkv": 0.9}),
    "olmoe-normalized": (
        "olmoe",
        {"num_experts": 3, "num_experts_per_tok": 2, "norm_topk_prob": True}
        | {"attention_bias": True, "num_key_value_heads": 4},
    ),
}


def batch_of(rows, length, vocab=96):
    """Rows with padding on the left (row 1) and on the right (row 2)."""
    tokens = np.random.default_rng(1).integers(3, vocab, (rows, length))
    mask = np.ones((rows, length), bool)
    mask[1, :4], mask[2, -3:] = False, False
    columns = {"tokens": tokens.astype(np.int32), "mask": mask}
    return jax.tree.map(jnp.asarray, columns)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.slow
def test_families(torch_model, same_logits, tmp_path, case):
    family, settings = CASES[case]
    model, _ = compare(torch_model, same_logits, tmp_path, family, **settings)
    _, params, _ = hf.load(tmp_path / "ours")
    bare = dataclasses.replace(model.config, source="{}")
    text = _hf_config.write(bare, "float32")
    assert dataclasses.replace(_hf_config.parse(text), source="{}") == bare
    mesh = sharding.make_mesh(fsdp=1, devices=jax.devices()[:1])
    sharding.by_rules(params, mesh, model.rules)  # every leaf has a rule


OTHERS = ("mixtral", "qwen3", "olmoe", "granite")


@pytest.mark.parametrize(
    "case", ["qwen2", *(pytest.param(x, marks=pytest.mark.slow) for x in OTHERS)]
)
@pytest.mark.slow
def test_greedy_generation_and_one_step_equal_those_of_torch(
    torch_model, tmp_path, case
):
    torch = pytest.importorskip("torch")
    reference = torch_model(CASES[case][0], **CASES[case][1])
    reference.save_pretrained(tmp_path / "theirs")
    model, params, _ = hf.load(tmp_path / "theirs")
    batch = batch_of(3, 12)

    prompt = {name: column[:, :8] for name, column in batch.items()}
    expected = reference.generate(
        torch.tensor(np.asarray(prompt["tokens"]), dtype=torch.long),
        attention_mask=torch.tensor(np.asarray(prompt["mask"]), dtype=torch.long),
        max_new_tokens=6,
        do_sample=False,
        eos_token_id=None,
    )[:, 8:]
    found = ju.generate(model, params, prompt, max_new_tokens=6)
    np.testing.assert_array_equal(found, expected.numpy())

    streams = {"forget": batch, "retain": batch_of(3, 12, vocab=40)}
    streams["forget"] = batch | {"ref_logps": jnp.array([-40.0, -30.0, -50.0])}
    npo = terms.on_logps(partial(losses.npo, beta=0.1), model, "forget")
    nll = terms.on_logps(losses.nll, model, "retain", reduce="token")
    parts = {"forget": npo, "retain": nll}
    tx = optax.chain(combine.weighted_sum(), optax.sgd(0.1))
    step = jax.jit(ju.make_step(parts, tx))
    state, metrics = step(
        ju.init_state(params, tx, jax.random.key(0)), streams, ju.Frozen()
    )

    def logps(stream):
        tokens = torch.tensor(np.asarray(stream["tokens"]), dtype=torch.long)
        real = torch.tensor(np.asarray(stream["mask"]))
        positions = (real.cumsum(1) - 1).clamp(min=0)
        logits = reference(
            input_ids=tokens, attention_mask=real.long(), position_ids=positions
        ).logits.log_softmax(-1)[:, :-1]
        each = logits.gather(-1, tokens[:, 1:, None])[..., 0]
        return each, real[:, 1:] & real[:, :-1]

    each, counts = logps(streams["forget"])
    ratio = (each * counts).sum(1) - torch.tensor([-40.0, -30.0, -50.0])
    forget = (-20.0 * torch.nn.functional.logsigmoid(-0.1 * ratio)).mean()
    each, counts = logps(streams["retain"])
    retain = -(each * counts).sum() / counts.sum()
    (forget + retain).backward()
    with torch.no_grad():
        for weight in reference.parameters():
            weight -= 0.1 * weight.grad
    np.testing.assert_allclose(
        metrics["forget/loss"], float(forget.detach()), rtol=1e-5
    )
    np.testing.assert_allclose(
        metrics["retain/loss"], float(retain.detach()), rtol=1e-5
    )
    hf.save(model, state.params, tmp_path / "ours")
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours")
    for (name, one), (_, other) in zip(
        reference.state_dict().items(), again.state_dict().items(), strict=True
    ):
        np.testing.assert_allclose(other, one, rtol=0, atol=1e-4, err_msg=name)


@pytest.mark.parametrize("case", ["mixtral", "qwen2"])
def test_one_tensor_for_all_experts_is_read_too(torch_model, tmp_path, case):
    """The names that transformers 5 has in memory, and may write."""
    family, settings = CASES[case]
    reference = torch_model(family, **settings)
    reference.save_pretrained(tmp_path / "each")
    _, expected, _ = hf.load(tmp_path / "each")
    tensors = {name: x.numpy() for name, x in reference.state_dict().items()}
    assert "model.layers.0.mlp.experts.gate_up_proj" in tensors
    (tmp_path / "fused").mkdir()
    safetensors.numpy.save_file(tensors, tmp_path / "fused" / "model.safetensors")
    text = (tmp_path / "each" / "config.json").read_text()
    (tmp_path / "fused" / "config.json").write_text(text)
    mesh = sharding.make_mesh(fsdp=2, expert=1, tensor=1, devices=jax.devices()[:2])
    for place in (None, mesh):
        _, params, _ = hf.load(tmp_path / "fused", mesh=place)
        jax.tree.map(np.testing.assert_array_equal, params, expected)


def test_settings_of_a_published_checkpoint():
    """Qwen3-30B-A3B's config.json, as transformers 4 wrote it."""
    text = json.dumps(
        {"model_type": "qwen3_moe", "attention_bias": False, "decoder_sparse_step": 1}
        | {"head_dim": 128, "hidden_act": "silu", "hidden_size": 2048}
        | {"intermediate_size": 6144, "max_position_embeddings": 40960}
        | {"mlp_only_layers": [], "moe_intermediate_size": 768, "norm_topk_prob": True}
        | {"num_attention_heads": 32, "num_experts": 128, "num_experts_per_tok": 8}
        | {"num_hidden_layers": 48, "num_key_value_heads": 4, "rms_norm_eps": 1e-06}
        | {"rope_scaling": None, "rope_theta": 1000000.0, "sliding_window": None}
        | {"use_sliding_window": False, "vocab_size": 151936}
    )
    found = _hf_config.parse(text, compute_dtype="bfloat16")
    expected = presets.PRESETS["qwen3-30b-a3b"]
    assert dataclasses.replace(found, source=expected.source) == expected
    names = _names.tensors(found)
    assert len(names) == 3 + 48 * (8 + 1 + 3 * 128)
    assert names["model.layers.47.mlp.experts.127.up_proj.weight"].shape == (768, 2048)
    fused = _names.tensors(found, "hf_fused")
    assert fused["model.layers.0.mlp.experts.gate_up_proj"].shape == (128, 1536, 2048)
    with pytest.raises(ValueError, match="qwen3_moe"):
        hf.save_gguf(models.make(found), {}, "qwen.gguf")


@pytest.mark.parametrize(
    ("family", "settings", "parts"),
    [
        ("qwen3_moe", {"mlp_only_layers": [1]}, ["mlp_only_layers", "[1]"]),
        ("qwen3_moe", {"decoder_sparse_step": 2}, ["decoder_sparse_step", "2"]),
        ("mixtral", {"num_experts_per_tok": 9}, ["per_token", "9", "num=8"]),
        ("mixtral", {"num_local_experts": 0}, ["num", "0"]),
        ("deepseek_v3", {"n_routed_experts": 8}, ["nearest family is 'qwen2_moe'"]),
        ("sparse_lm", {"num_experts": 8}, ["'mixtral'", "its mixture of experts"]),
    ],
    ids=str,
)
def test_unsupported_variants_are_refused(mentions, family, settings, parts):
    base = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 3}
    base |= {"num_attention_heads": 4, "intermediate_size": 48, "model_type": family}
    base |= {"num_key_value_heads": 2}
    if family in ("mixtral", "qwen3_moe"):
        _hf_config.parse(json.dumps(base))
    with pytest.raises(ValueError) as info:
        _hf_config.parse(json.dumps(base | settings))
    mentions(info, *parts)
