# SPDX-License-Identifier: Apache-2.0
"""LoRA adapters of PEFT, merged onto their base model.

The expected weights are computed here from the definition; one test compares with PEFT.
"""

import json
import math
import warnings

import jax
import numpy as np
import pytest
import safetensors.numpy

from jaxunlearn import models, sharding, trees
from jaxunlearn.io import _hub, hf

SMALL = {
    "vocab": 24,
    "width": 16,
    "layers": 2,
    "heads": 2,
    "kv_heads": 1,
    "head_dim": 8,
    "hidden": 32,
    "positions": 32,
}
Q, UP = "model.layers.1.self_attn.q_proj", "model.layers.0.mlp.up_proj"
EMBED, HEAD = "model.embed_tokens", "lm_head"


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    """Folders of small base models: "llama", "tied" and "gpt2"."""
    place = tmp_path_factory.mktemp("bases")
    biases = dict.fromkeys(("qkv_bias", "out_bias", "mlp_bias"), True)
    gpt2 = {"norm": "layer", "norm_eps": 1e-5, "gated": False, "rope": None}
    gpt2 |= {"kv_heads": 2, "activation": "gelu_tanh", "tied": True} | biases
    for name, changes in {"llama": {}, "tied": {"tied": True}, "gpt2": gpt2}.items():
        family = "gpt2" if name == "gpt2" else "llama"
        model = models.make(
            models.DecoderConfig(**{"family": family} | SMALL | changes)
        )
        hf.save(model, model.init(jax.random.key(0)), place / name)
    return place


def adapter(folder, base, tensors, **settings):
    """Writes an adapter with these tensors, named without PEFT's prefix."""
    folder.mkdir(exist_ok=True)
    settings = {
        "peft_type": "LORA",
        "r": 2,
        "lora_alpha": 6,
        "base_model_name_or_path": str(base),
        "target_modules": ["q_proj"],
        "use_dora": False,
        "runtime_config": {"ephemeral_gpu_offload": False},
        "lora_bias": False,
    } | settings
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    named = {f"base_model.model.{name}": value for name, value in tensors.items()}
    safetensors.numpy.save_file(named, folder / "adapter_model.safetensors")
    return folder


def random(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def low_rank(module, outputs, inputs, rank=2):
    return {
        f"{module}.lora_A.weight": random(rank, inputs, seed=1),
        f"{module}.lora_B.weight": random(outputs, rank, seed=2),
    }


def merged(folder, tmp_path, **more):
    """The tensors of the merged model under their names in transformers."""
    model, params, _ = hf.load(folder, **more)
    hf.save(model, params, tmp_path / "merged")
    return safetensors.numpy.load_file(tmp_path / "merged" / "model.safetensors")


def tensors_of(folder):
    return safetensors.numpy.load_file(folder / "model.safetensors")


@pytest.mark.parametrize(
    ("settings", "scales"),
    [
        ({}, (3.0, 3.0)),
        ({"use_rslora": True}, (6 / math.sqrt(2), 6 / math.sqrt(2))),
        ({"lora_alpha": 1}, (0.5, 0.5)),
        ({"alpha_pattern": {"q_proj": 8}}, (4.0, 3.0)),
        ({"alpha_pattern": {"layers.0.mlp.up_proj": 8, "up_proj": 1}}, (3.0, 4.0)),
        ({"alpha_pattern": {"proj": 8, r".*\.1\..*q_proj": 10}}, (5.0, 3.0)),
        ({"r": 7, "rank_pattern": {"q_proj": 2, "up_proj": 2}}, (3.0, 3.0)),
        ({"init_lora_weights": "gaussian", "bias": "none"}, (3.0, 3.0)),
    ],
)
def test_a_merged_weight_is_w_plus_s_b_a(bases, tmp_path, settings, scales):
    parts = low_rank(Q, 16, 16) | low_rank(UP, 32, 16)
    folder = adapter(tmp_path / "a", bases / "llama", parts, **settings)
    found, before = merged(folder, tmp_path), tensors_of(bases / "llama")
    for module, scale in zip((Q, UP), scales, strict=True):
        product = parts[f"{module}.lora_B.weight"] @ parts[f"{module}.lora_A.weight"]
        before[f"{module}.weight"] = before[f"{module}.weight"] + scale * product
    assert found.keys() == before.keys()
    for name, value in before.items():
        np.testing.assert_allclose(found[name], value, atol=1e-5)


def test_weights_stored_as_inputs_by_outputs(bases, tmp_path):
    module = "transformer.h.1.attn.c_attn"
    parts = low_rank(module, 48, 16)
    parts["transformer.ln_f.weight"] = random(16)
    parts["transformer.h.0.mlp.c_fc.base_layer.bias"] = random(32)
    for flag in (True, False):  # PEFT decides by the kind of layer, whatever it says
        folder = adapter(tmp_path / "a", bases / "gpt2", parts, fan_in_fan_out=flag)
        found, before = merged(folder, tmp_path), tensors_of(bases / "gpt2")
        a, b = (parts[f"{module}.lora_{half}.weight"] for half in "AB")
        expected = before[f"{module}.weight"] + 3.0 * (b @ a).T
        np.testing.assert_allclose(found[f"{module}.weight"], expected, atol=1e-5)
        np.testing.assert_array_equal(found["transformer.ln_f.weight"], random(16))
        np.testing.assert_array_equal(
            found["transformer.h.0.mlp.c_fc.bias"], random(32)
        )


def test_tied_matrices_that_the_adapter_separates(bases, tmp_path):
    before = tensors_of(bases / "tied")["model.embed_tokens.weight"]
    new = random(24, 16)
    half = {
        f"{EMBED}.lora_embedding_A": random(2, 24, seed=1),
        f"{EMBED}.lora_embedding_B": random(16, 2, seed=2),
    }
    change = 3.0 * (
        half[f"{EMBED}.lora_embedding_B"] @ half[f"{EMBED}.lora_embedding_A"]
    )
    cases = [
        ({f"{EMBED}.weight": new}, {}, new, before),
        ({f"{EMBED}.weight": new}, {"ensure_weight_tying": True}, new, None),
        ({f"{HEAD}.modules_to_save.weight": new}, {}, before, new),
        (half, {}, before + change.T, before),
        ({f"{EMBED}.weight": new, f"{HEAD}.weight": new + 1}, {}, new, new + 1),
    ]
    for parts, settings, embedding, head in cases:
        folder = adapter(tmp_path / "a", bases / "tied", parts, **settings)
        found = merged(folder, tmp_path)
        np.testing.assert_allclose(found[f"{EMBED}.weight"], embedding, atol=1e-5)
        assert (f"{HEAD}.weight" in found) == (head is not None)
        if head is not None:
            np.testing.assert_allclose(found[f"{HEAD}.weight"], head, atol=1e-5)


def test_an_embedding_with_new_tokens_sets_the_vocabulary(bases, tmp_path):
    parts = {f"{name}.weight": random(27, 16) for name in (EMBED, HEAD)}
    folder = adapter(tmp_path / "a", bases / "llama", parts)
    model, params, _ = hf.load(folder)
    assert model.config.vocab == 27
    hf.save(model, params, tmp_path / "merged")
    assert hf.model_from_config(tmp_path / "merged").config.vocab == 27


def test_the_base_is_found_or_given(bases, tmp_path, mentions):
    parts = low_rank(Q, 16, 16)
    folder = adapter(tmp_path / "a", tmp_path / "gone", parts)
    with pytest.raises(FileNotFoundError) as info:
        hf.load(folder)
    mentions(info, folder, tmp_path / "gone", "base=")
    expected = merged(folder, tmp_path, base=bases / "llama")
    (tmp_path / "near").symlink_to(bases / "llama")
    adapter(tmp_path / "a", "../near", parts)
    found = merged(folder, tmp_path)
    np.testing.assert_array_equal(found[f"{Q}.weight"], expected[f"{Q}.weight"])
    adapter(tmp_path / "a", "", parts)
    with pytest.raises(ValueError, match="base="):
        hf.load(folder)
    with pytest.raises(ValueError, match="base="):
        hf.load(bases / "llama", base=bases / "tied")
    (folder / "adapter_model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"adapter_model\.safetensors"):
        hf.load(folder, base=bases / "llama")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("peft_type", "IA3"),
        ("use_dora", True),
        ("lora_bias", True),
        ("layer_replication", [[0, 1]]),
        ("target_parameters", ["mlp.experts.gate_up_proj"]),
        ("trainable_token_indices", [3]),
        ("alora_invocation_tokens", [1]),
        ("init_lora_weights", "pissa_niter_4"),
        ("init_lora_weights", "loftq"),
        ("a_setting_of_the_future", 1),
    ],
)
def test_other_adapters_are_refused_by_name(bases, tmp_path, mentions, name, value):
    folder = adapter(
        tmp_path / "a", bases / "llama", low_rank(Q, 16, 16), **{name: value}
    )
    with pytest.raises(ValueError) as info:
        hf.load(folder)
    mentions(info, f"{name}={value!r}", "adapter_config.json", "merge_and_unload")


@pytest.mark.parametrize(
    ("parts", "names"),
    [
        (low_rank("model.layers.7.mlp.up_proj", 32, 16), ["model.layers.7.mlp"]),
        (low_rank(Q, 16, 8), [Q, "(2, 16)", "(2, 8)"]),
        (low_rank(Q, 16, 16, rank=3), [Q, "rank 2", "(3, 16)"]),
        ({f"{Q}.lora_A.weight": random(2, 16)}, [Q]),
        ({f"{Q}.lora_magnitude_vector": random(16)}, ["lora_magnitude_vector"]),
        ({f"{Q}.bias": random(16)}, [f"{Q}.bias"]),
    ],
)
def test_tensors_of_another_model_are_named(bases, tmp_path, mentions, parts, names):
    folder = adapter(tmp_path / "a", bases / "llama", parts)
    with pytest.raises(ValueError) as info:
        hf.load(folder)
    mentions(info, folder, *names)


def test_shards_of_merged_weights(bases, tmp_path):
    mesh = sharding.make_mesh(fsdp=4, tensor=2)
    parts = low_rank(Q, 16, 16) | low_rank(UP, 32, 16)
    folder = adapter(tmp_path / "a", bases / "llama", parts)
    _, placed, _ = hf.load(folder, mesh=mesh)
    _, params, _ = hf.load(folder)
    for path, leaf in trees.paths(placed).items():
        np.testing.assert_allclose(leaf, trees.paths(params)[path], atol=1e-6)


def test_an_adapter_in_the_folder_of_a_model_is_reported(bases, tmp_path):
    folder = adapter(tmp_path / "a", bases / "llama", low_rank(Q, 16, 16))
    for file in (bases / "llama").iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    with pytest.warns(UserWarning, match="not merged"):
        _, params, _ = hf.load(folder)
    jax.tree.map(np.testing.assert_array_equal, params, hf.load(bases / "llama")[1])


def test_merged_logits_are_those_of_peft(torch_model, same_logits, tmp_path):
    peft = pytest.importorskip("peft")
    torch = pytest.importorskip("torch")
    torch_model("llama").save_pretrained(tmp_path / "base")
    import transformers

    base = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    settings = peft.LoraConfig(
        task_type="CAUSAL_LM",
        target_modules="all-linear",
        r=4,
        use_rslora=True,
        rank_pattern={"q_proj": 2},
        modules_to_save=["embed_tokens"],
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trained = peft.get_peft_model(base, settings).eval()
        with torch.no_grad():
            for weight in trained.parameters():
                if weight.requires_grad:
                    weight.add_(0.1 * torch.randn_like(weight))
        trained.save_pretrained(tmp_path / "adapter")
    model, params, _ = hf.load(tmp_path / "adapter")
    same_logits(model, params, trained)


def test_the_file_names_are_those_of_peft():
    utils = pytest.importorskip("peft.utils")
    assert _hub.ADAPTER == utils.CONFIG_NAME
    assert _hub.ADAPTER_WEIGHTS == utils.SAFETENSORS_WEIGHTS_NAME
