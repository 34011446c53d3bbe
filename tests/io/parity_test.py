# SPDX-License-Identifier: Apache-2.0
"""Loaded checkpoints compute what torch transformers computes, family by family."""

import jax
import numpy as np
import pytest

from jaxunlearn import trees
from jaxunlearn.io import hf

transformers = pytest.importorskip("transformers")

SHORT, LONG = [1 + 0.1 * i for i in range(4)], [2 + 0.3 * i for i in range(4)]
ROPES = {
    "default": {},
    "linear": {"factor": 2.5},
    "dynamic": {"factor": 4.0},
    "yarn": {"factor": 4.0, "original_max_position_embeddings": 32},
    "longrope": {
        "factor": 4.0,
        "original_max_position_embeddings": 32,
        "short_factor": SHORT,
        "long_factor": LONG,
    },
    "llama3": {
        "factor": 8.0,
        "original_max_position_embeddings": 32,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
    },
}


def compare(torch_model, same_logits, tmp_path, family, shards="5GB", **settings):
    """torch to us, us to torch again, and once more to us."""
    reference = torch_model(family, **settings)
    reference.save_pretrained(tmp_path / "theirs", max_shard_size=shards)
    if shards != "5GB":
        assert (tmp_path / "theirs" / "model.safetensors.index.json").is_file()
    model, params, tokenizer = hf.load(tmp_path / "theirs")
    assert tokenizer is None
    assert model.config.family == family
    worst = same_logits(model, params, reference)

    hf.save(model, params, tmp_path / "ours")
    again = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "ours", attn_implementation="eager"
    )
    assert type(again) is type(reference)
    for (name, one), (_, other) in zip(
        reference.state_dict().items(), again.state_dict().items(), strict=True
    ):
        assert np.array_equal(one.numpy(), other.numpy()), name
    same_logits(model, params, again)

    reloaded, params_again, _ = hf.load(tmp_path / "ours")
    jax.tree.map(np.testing.assert_array_equal, params, params_again)
    assert trees.paths(params).keys() == trees.paths(params_again).keys()
    return model, worst


# rope_test compares the angles of every kind with transformers.
@pytest.mark.parametrize(
    "kind",
    [
        x if x in ("dynamic", "longrope") else pytest.param(x, marks=pytest.mark.slow)
        for x in ROPES
    ],
)
def test_llama_with_every_rope(torch_model, same_logits, tmp_path, kind):
    rope = {"rope_type": kind, "rope_theta": 1000.0, **ROPES[kind]}
    positions = 32 if kind == "dynamic" else 128
    model, _ = compare(
        torch_model,
        same_logits,
        tmp_path,
        "llama",
        rope_parameters=rope,
        max_position_embeddings=positions,
    )
    assert model.config.rope.kind == kind


@pytest.mark.parametrize(
    ("family", "settings"),
    [
        ("llama", {"attention_bias": True, "mlp_bias": True, "shards": "20KB"}),
        ("llama", {"tie_word_embeddings": True, "head_dim": 12}),
        ("mistral", {"sliding_window": 9, "shards": "30KB"}),
        ("mistral", {"sliding_window": None}),
        ("qwen2", {"tie_word_embeddings": True, "num_key_value_heads": 1}),
        (
            "qwen2",
            {
                "use_sliding_window": True,
                "sliding_window": 6,
                "max_window_layers": 1,
                "num_hidden_layers": 3,
            },
        ),
        ("qwen3", {"head_dim": 16, "tie_word_embeddings": True, "shards": "20KB"}),
        ("qwen3", {"head_dim": 8, "attention_bias": True, "num_hidden_layers": 3}),
        ("phi3", {"sliding_window": 9, "partial_rotary_factor": 0.5, "shards": "20KB"}),
    ],
    ids=str,
)
def test_families(torch_model, same_logits, tmp_path, family, settings):
    model, _ = compare(torch_model, same_logits, tmp_path, family, **settings)
    assert model.config.tied == settings.get("tie_word_embeddings", False)
    if "sliding_window" in settings:
        assert (model.config.windows is None) == (settings["sliding_window"] is None)


def test_the_old_spelling_of_rope_computes_the_same(torch_model, same_logits, tmp_path):
    """A config.json as transformers 4 wrote it."""
    import json

    rope = {"rope_type": "llama3", "rope_theta": 1000.0, **ROPES["llama3"]}
    reference = torch_model("llama", rope_parameters=rope)
    reference.save_pretrained(tmp_path)
    settings = json.loads((tmp_path / "config.json").read_text())
    rope = settings.pop("rope_parameters")
    settings["rope_theta"] = rope.pop("rope_theta")
    settings["rope_scaling"] = rope | {"type": rope["rope_type"]}
    settings["torch_dtype"] = settings.pop("dtype")
    (tmp_path / "config.json").write_text(json.dumps(settings))
    model, params, _ = hf.load(tmp_path)
    same_logits(model, params, reference)
    written = json.loads(
        hf._settings_files(model.config, "bfloat16", None)["config.json"]
    )
    assert written == settings | {"torch_dtype": "bfloat16"}


def test_the_conversion_command_for_pickles_works(torch_model, tmp_path):
    torch = pytest.importorskip("torch")
    reference = torch_model("llama", tie_word_embeddings=True)
    folder = tmp_path / "it's pickled"
    reference.config.save_pretrained(folder)
    torch.save(reference.state_dict(), folder / "pytorch_model.bin")
    with pytest.raises(ValueError, match="safetensors") as info:
        hf.load(folder)
    command = str(info.value).split('python -c "')[1].rstrip('"')
    exec(command, {})
    _, params, _ = hf.load(f"{folder}-safetensors")
    np.testing.assert_array_equal(
        params["embed"]["embedding"], reference.state_dict()["lm_head.weight"].numpy()
    )
