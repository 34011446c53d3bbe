# SPDX-License-Identifier: Apache-2.0
"""The text model of a multimodal folder: loaded alone, and saved as a text model."""

import json

import jax
import numpy as np
import pytest
import safetensors.numpy

from jaxunlearn.io import _hf_config, hf
from tests.io.conftest import torch_logits

transformers = pytest.importorskip("transformers")
TEXT = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_key_value_heads": 2,
    "num_attention_heads": 4,
    "head_dim": 12,
    "vocab_size": 96,
    "sliding_window": 7,
    "max_position_embeddings": 128,
}
VISION = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}


@pytest.fixture(scope="module")
def gemma3():
    """A random multimodal Gemma 3 with layers of both kinds."""
    torch = pytest.importorskip("torch")
    kinds = ["sliding_attention", "full_attention"]
    config = transformers.Gemma3Config(
        text_config=TEXT | {"layer_types": kinds},
        vision_config=VISION,
        mm_tokens_per_image=4,
        image_token_index=95,
        boi_token_index=94,
        eoi_token_index=93,
    )
    torch.manual_seed(0)
    model = transformers.Gemma3ForConditionalGeneration(config).eval()
    model.set_attn_implementation("eager")
    with torch.no_grad():
        for weight in model.parameters():
            weight.normal_(0.0, 0.2)
    return model


def batch():
    tokens = np.random.default_rng(0).integers(0, 93, (2, 20))
    mask = np.ones((2, 20), bool)
    mask[1, :6] = False
    return tokens, mask


def logits(model, params, tokens, mask):
    columns = {"tokens": tokens.astype(np.int32), "mask": mask}
    hidden = jax.jit(model.apply)(params, columns).hidden
    return np.asarray(model.unembed(params, hidden))


def test_the_text_model_computes_the_same_and_is_saved_alone(gemma3, tmp_path):
    gemma3.save_pretrained(tmp_path / "theirs")
    with pytest.warns(UserWarning, match="text model"):
        model, params, _ = hf.load(tmp_path / "theirs")
    assert model.config.family == "gemma3_text" and model.config.windows == (7, None)
    tokens, mask = batch()
    want = torch_logits(gemma3, tokens, mask)
    got = logits(model, params, tokens, mask)
    np.testing.assert_allclose(got[mask], want[mask], atol=5e-4)
    assert np.array_equal(got.argmax(-1)[mask], want.argmax(-1)[mask])

    hf.save(model, params, tmp_path / "ours")
    again = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "ours", attn_implementation="eager"
    )
    assert type(again) is transformers.Gemma3ForCausalLM
    np.testing.assert_allclose(
        torch_logits(again, tokens, mask)[mask], want[mask], atol=1e-5
    )
    reloaded, params_again, _ = hf.load(tmp_path / "ours")  # no warning
    assert reloaded.config.windows == model.config.windows
    jax.tree.map(np.testing.assert_array_equal, params, params_again)


@pytest.mark.parametrize(
    "prefixes",
    [
        ("language_model.model.", "vision_tower.", "multi_modal_projector."),
        (
            "model.language_model.",
            "model.vision_tower.",
            "model.multi_modal_projector.",
        ),
    ],
    ids=["transformers 4", "in memory"],
)
def test_every_spelling_of_the_tensors_loads(gemma3, tmp_path, prefixes):
    """Also with a text_config that leaves out what transformers assumes."""
    names = ("model.language_model.", "model.vision_tower.")
    swaps = dict(zip((*names, "model.multi_modal_projector."), prefixes, strict=True))
    tensors = {}
    for name, value in gemma3.state_dict().items():
        found = next((p for p in swaps if name.startswith(p)), "")
        if name != "lm_head.weight":  # tied
            name = swaps.get(found, "") + name.removeprefix(found)
            tensors[name] = value.numpy()
    (tmp_path / "config.json").write_text(
        json.dumps(
            {"model_type": "gemma3", "vision_config": VISION, "eos_token_id": [1, 2]}
            | {"text_config": TEXT | {"sliding_window_pattern": 2}}
        )
    )
    safetensors.numpy.save_file(tensors, tmp_path / "model.safetensors")
    with pytest.warns(UserWarning, match="left out"):
        model, params, _ = hf.load(tmp_path)
    embedding = gemma3.state_dict()["model.language_model.embed_tokens.weight"]
    np.testing.assert_array_equal(params["embed"]["embedding"], embedding.numpy())
    assert model.config.activation == "gelu_tanh" and model.config.tied
    files = hf._settings_files(model.config, "float32", None)
    written = json.loads(files["config.json"])
    assert written["model_type"] == "gemma3_text" and "vision_config" not in written
    assert json.loads(files["generation_config.json"])["eos_token_id"] == [1, 2]


def test_end_ids_are_those_of_the_multimodal_model_and_of_its_text_model():
    inner = TEXT | {"eos_token_id": 1}
    given = {"model_type": "gemma3", "eos_token_id": [1, 90], "text_config": inner}
    config = _hf_config.parse(json.dumps(given))
    assert config.eos_ids == (1, 90)
    assert _hf_config.parse(_hf_config.write(config, "float32")).eos_ids == (1, 90)
