# SPDX-License-Identifier: Apache-2.0
"""Tiny checkpoints, made when a test asks for them, and a comparison with torch."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxunlearn.io import hf
from jaxunlearn.models import _config, decoder

DROP = "dropped"  # a setting that a family does not have


@pytest.fixture
def mentions():
    """Checks that an error's message holds every given part."""

    def check(info, *parts):
        missing = [part for part in parts if str(part) not in str(info.value)]
        assert not missing, f"{missing} not in: {info.value}"

    return check


@pytest.fixture(scope="session")
def tiny():
    """(model, params) of a random two-layer Llama with a separate output matrix."""
    config = _config.DecoderConfig(
        family="llama",
        vocab=64,
        width=32,
        layers=2,
        heads=4,
        kv_heads=2,
        head_dim=8,
        hidden=48,
        positions=64,
    )
    model = decoder.make(config)
    return model, model.init(jax.random.key(0))


@pytest.fixture
def folder(tiny, tmp_path):
    """The tiny model, saved."""
    model, params = tiny
    hf.save(model, params, tmp_path / "tiny")
    return tmp_path / "tiny"


@pytest.fixture(scope="session")
def torch_model():
    """Makes a random torch model of a family; every weight, bias and norm is random."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")

    def make(family, **settings):
        settings = {
            "vocab_size": 96,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 128,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "pad_token_id": 0,
            "attn_implementation": "eager",
        } | settings
        settings = {name: v for name, v in settings.items() if v != DROP}
        config = transformers.AutoConfig.for_model(family, **settings)
        torch.manual_seed(0)
        model = transformers.AutoModelForCausalLM.from_config(config).eval()
        with torch.no_grad():
            for name, weight in model.named_parameters():
                if "norm" in name or ".ln_" in name:
                    weight.normal_(1.0, 0.2)
                else:
                    weight.normal_(0.0, 0.2)
        return model

    return make


def torch_logits(reference, tokens, mask, by_row=None):
    """torch's logits [B, L, V]; with `by_row` those of each row alone, without padding.

    The rotations of a model of such rows depend on the longest row of a batch, and with
    `dynamic` on the longest row so far, until a row of one token.
    """
    import torch

    def run(tokens, mask):
        return reference(
            input_ids=torch.tensor(tokens),
            attention_mask=torch.tensor(mask, dtype=torch.long),
            position_ids=torch.tensor(np.maximum(mask.cumsum(1) - 1, 0)),
        ).logits.numpy()

    with torch.no_grad():
        if not by_row:
            return run(tokens, mask)
        found = np.zeros((*tokens.shape, reference.config.vocab_size), np.float32)
        for row, real in enumerate(mask):
            run(tokens[:1, :1], mask[:1, :1])
            alone = tokens[row, real][None]
            found[row, real] = run(alone, np.ones(alone.shape, bool))[0]
        return found


@pytest.fixture(scope="session")
def same_logits():
    """Asserts that our logits are torch's at every real token of ragged batches."""
    pytest.importorskip("torch")

    def check(model, params, reference, *, length=40, sides=("left", "right")):
        rng = np.random.default_rng(3)
        tokens = rng.integers(0, model.config.vocab, (3, length))
        worst, apply = 0.0, jax.jit(model.apply)
        for side in sides:
            mask = np.ones((3, length), bool)
            for row in (1, 2):
                cut = 7 * row
                mask[row, slice(None, cut) if side == "left" else slice(-cut, None)] = 0
            columns = {"tokens": tokens.astype(np.int32), "mask": mask}
            hidden = apply(params, jax.tree.map(jnp.asarray, columns)).hidden
            ours = np.asarray(model.unembed(params, hidden))
            theirs = torch_logits(reference, tokens, mask, model.config.cache_limit)
            assert ours.dtype == np.float32
            assert np.std(theirs[mask]) > 0.3, "logits are nearly constant"
            worst = max(worst, np.max(np.abs(ours - theirs)[mask]))
            assert worst <= 5e-4, f"{side} padding: off by {worst}"
            assert np.array_equal(ours.argmax(-1)[mask], theirs.argmax(-1)[mask])
        return worst

    return check
