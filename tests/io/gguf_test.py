# SPDX-License-Identifier: Apache-2.0
"""GGUF files written by the gguf library load with the written weights."""

import dataclasses
import json
import sys

import jax
import numpy as np
import pytest
import safetensors.numpy
from numpy.testing import assert_allclose

from jaxunlearn import sharding
from jaxunlearn.io import _gguf, _gguf_tokenizer, hf
from jaxunlearn.models import _config, _rope, decoder

gguf = pytest.importorskip("gguf")

BYTES = [chr(c) for c in range(33, 127)] + ["Ġ"]
PIECES = [*BYTES, "he", "Ġhe", "<s>", "</s>", "<pad>"]
MERGES = ["h e", "Ġ he"]
TEMPLATE = "{% for m in messages %}<s>{{ m['content'] }}{% endfor %}"


def permute(weights, heads):
    """The reordering of llama.cpp's convert_hf_to_gguf.py."""
    split = weights.reshape(
        heads, 2, weights.shape[0] // heads // 2, *weights.shape[1:]
    )
    return split.swapaxes(1, 2).reshape(weights.shape)


def write(
    file, model, params, tmp_path, *, quantize=None, more=(), tokens=False, extra=None
):
    """A GGUF file of the model; names come from gguf's table, not from ours."""
    c = model.config
    arch = "llama" if c.family == "mistral" else c.family
    hf.save(model, params, tmp_path / "plain")
    tensors = safetensors.numpy.load_file(tmp_path / "plain" / "model.safetensors")
    table = gguf.get_tensor_name_map(gguf.MODEL_ARCH[arch.upper()], c.layers)
    writer = gguf.GGUFWriter(file, arch)
    writer.add_block_count(c.layers)
    writer.add_context_length(c.positions)
    writer.add_embedding_length(c.width)
    writer.add_feed_forward_length(c.hidden)
    writer.add_head_count(c.heads)
    writer.add_head_count_kv(c.kv_heads)
    writer.add_key_length(c.head_dim)
    writer.add_layer_norm_rms_eps(c.norm_eps)
    writer.add_rope_freq_base(c.rope.theta)
    for name, *values in more:
        writer.kv_data[0].pop(name.replace("add_", f"{arch}.attention."), None)
        writer.kv_data[0].pop(name.replace("add_", f"{arch}."), None)
        getattr(writer, name)(*values)
    if tokens:
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(tokens)
        writer.add_token_list(PIECES)
        writer.add_token_merges(MERGES)
        writer.add_token_types([1] * (len(PIECES) - 3) + [3, 3, 3])
        writer.add_bos_token_id(PIECES.index("<s>"))
        writer.add_eos_token_id(PIECES.index("</s>"))
        writer.add_add_bos_token(tokens == "llama-bpe")
        writer.add_chat_template(TEMPLATE)
    for name, values in tensors.items():
        if arch == "llama" and ("q_proj" in name or "k_proj" in name):
            values = permute(values, c.heads if "q_proj" in name else c.kv_heads)
        name = table.get_name(name, try_suffixes=(".weight", ".bias"))
        if quantize and values.ndim == 2:
            kind = gguf.GGMLQuantizationType[quantize]
            packed = gguf.quants.quantize(np.ascontiguousarray(values), kind)
            writer.add_tensor(name, packed, raw_dtype=kind)
        else:
            writer.add_tensor(name, np.ascontiguousarray(values))
    for name, values in (extra or {}).items():
        writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


def model_of(family, **changes):
    settings = {
        "family": family,
        "vocab": len(PIECES),
        "width": 32,
        "layers": 2,
        "heads": 4,
        "kv_heads": 2,
        "head_dim": 8,
        "hidden": 64,
        "positions": 64,
        "norm_eps": 1e-5,
    } | changes
    model = decoder.make(_config.DecoderConfig(**settings))
    params = model.init(jax.random.key(1))
    rng = np.random.default_rng(0)  # biases and norms start out all alike
    noise = jax.tree.map(
        lambda x: rng.normal(0, 0.1, x.shape).astype(np.float32), params
    )
    return model, jax.tree.map(lambda x, y: x + y, params, noise)


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("llama", {}),
        ("llama", {"tied": True, "kv_heads": 4}),
        ("llama", {"qkv_bias": True, "out_bias": True, "mlp_bias": True}),
        ("qwen2", {"qkv_bias": True}),
        ("qwen3", {"qk_norm": True, "head_dim": 16, "tied": True}),
    ],
    ids=str,
)
def test_loading_returns_the_written_values(tmp_path, family, changes):
    model, params = model_of(family, **changes)
    file = write(tmp_path / "tiny.gguf", model, params, tmp_path)
    again, loaded, tokenizer = hf.load(file)
    jax.tree.map(np.testing.assert_array_equal, loaded, params)
    assert dataclasses.replace(again.config, source="{}") == model.config
    assert tokenizer is None

    hf.save(again, loaded, tmp_path / "saved")
    _, reloaded, _ = hf.load(tmp_path / "saved")
    jax.tree.map(np.testing.assert_array_equal, reloaded, params)


@pytest.mark.parametrize(("quantize", "off"), [("Q8_0", 6e-3), ("F16", 5e-4)])
def test_quantized_weights_become_float32(tmp_path, quantize, off):
    model, params = model_of("llama")
    file = write(tmp_path / "q.gguf", model, params, tmp_path, quantize=quantize)
    _, loaded, _ = hf.load(file)
    jax.tree.map(lambda a, b: assert_allclose(a, b, atol=off), loaded, params)
    assert not np.array_equal(
        loaded["embed"]["embedding"], params["embed"]["embedding"]
    )


@pytest.mark.parametrize(
    ("more", "rope"),
    [
        (
            [
                ("add_rope_scaling_type", gguf.RopeScalingType.LINEAR),
                ("add_rope_scaling_factor", 4.0),
            ],
            {"kind": "linear", "factor": 4.0},
        ),
        (
            [
                ("add_rope_scaling_type", gguf.RopeScalingType.YARN),
                ("add_rope_scaling_factor", 4.0),
                ("add_rope_scaling_orig_ctx_len", 16),
            ],
            {"kind": "yarn", "factor": 4.0, "original_positions": 16},
        ),
        ([("add_rope_scaling_type", gguf.RopeScalingType.NONE)], {}),
    ],
    ids=["linear", "yarn", "none"],
)
def test_rope_scaling_in_the_metadata(tmp_path, more, rope):
    model, params = model_of("llama")
    file = write(tmp_path / "rope.gguf", model, params, tmp_path, more=more)
    assert hf.load(file)[0].config.rope == _config.RopeConfig(**rope)


@pytest.mark.parametrize("quantize", [None, "Q8_0"])
def test_loading_on_a_mesh_gives_the_same_values(tmp_path, quantize):
    model, params = model_of("llama")
    file = write(tmp_path / "x.gguf", model, params, tmp_path, quantize=quantize)
    mesh = sharding.make_mesh(fsdp=4, tensor=2)
    _, placed, _ = hf.load(file, mesh=mesh)
    jax.tree.map(np.testing.assert_array_equal, placed, hf.load(file)[1])
    wanted = sharding.by_rules(params, mesh, model.rules)
    assert jax.tree.map(lambda x: x.sharding, placed) == wanted


@pytest.mark.parametrize("original", [8192, 100])
def test_rope_divisors_become_the_same_frequencies(tmp_path, original):
    """Llama 3.1's scaling is a tensor; other divisors are stored as a list."""
    model, params = model_of("llama", rope=_config.RopeConfig(theta=5e5))
    scaled = dataclasses.replace(
        model.config.rope, kind="llama3", factor=8.0, original_positions=original
    )
    plain, _ = _rope.frequencies(model.config.rope, 8, 1)
    want, _ = _rope.frequencies(scaled, 8, 1)
    divisors = np.asarray(plain / want)
    extra = {"rope_freqs.weight": divisors}
    file = write(tmp_path / "rope.gguf", model, params, tmp_path, extra=extra)
    rope = hf.load(file)[0].config.rope
    assert rope.kind == ("llama3" if original == 8192 else "longrope")
    got, scale = _rope.frequencies(rope, 8, 64)
    assert_allclose(got, want, rtol=1e-5)
    assert scale == 1.0


@pytest.mark.parametrize("rule", ["smollm", "qwen2", "llama-bpe", "default"])
def test_the_tokenizer_is_reconstructed(tmp_path, rule):
    pytest.importorskip("transformers")
    model, params = model_of("llama")
    file = write(tmp_path / "t.gguf", model, params, tmp_path, tokens=rule)
    again, loaded, tokenizer = hf.load(file)
    ids = tokenizer("he he 42!</s>")["input_ids"]
    expected = ["he", "Ġhe", "Ġ", "4", "2", "!", "</s>"]
    assert [PIECES[i] for i in ids] == ["<s>"] * (rule == "llama-bpe") + expected
    assert tokenizer.decode(ids, skip_special_tokens=True) == "he he 42!"
    assert (tokenizer.bos_token, tokenizer.eos_token) == ("<s>", "</s>")
    assert tokenizer.pad_token == "</s>"
    assert tokenizer.model_max_length == 64
    chat = [{"role": "user", "content": "he"}]
    assert tokenizer.apply_chat_template(chat, tokenize=False) == "<s>he"

    hf.save(again, loaded, tmp_path / "saved", tokenizer=tokenizer)
    loaded_tokenizer = hf.load(tmp_path / "saved")[2]
    assert loaded_tokenizer("he he 42!</s>")["input_ids"] == ids
    assert loaded_tokenizer.chat_template == TEMPLATE
    settings = json.loads((tmp_path / "saved" / "config.json").read_text())
    assert settings["eos_token_id"] == PIECES.index("</s>")


def test_an_unknown_tokenizer_gives_none_and_a_warning(tmp_path):
    model, params = model_of("llama")
    file = write(tmp_path / "t.gguf", model, params, tmp_path, tokens="mystery")
    with pytest.warns(UserWarning, match="'mystery'.*AutoTokenizer"):
        assert hf.load(file)[2] is None


def test_every_end_of_an_answer_is_among_the_ids(tmp_path):
    names = ["<|im_end|>", "x", "<|endoftext|>", "<|eot_id|>", "</s>", "<turn>"]
    fields = {"tokens": names, "eos_token_id": 3, "eot_token_id": 5, "eom_token_id": 77}
    fields = {f"tokenizer.ggml.{name}": value for name, value in fields.items()}
    assert _gguf_tokenizer.end_ids(fields) == [3, 5, 0, 2, 4]
    assert _gguf_tokenizer.end_ids({"tokenizer.ggml.eos_token_id": 7}) == [7]
    model, params = model_of("llama")
    more = [("add_eot_token_id", PIECES.index("<pad>"))]
    file = write(
        tmp_path / "t.gguf", model, params, tmp_path, tokens="qwen2", more=more
    )
    settings = json.loads(hf.model_from_config(file).config.source)
    ends = [PIECES.index("</s>"), PIECES.index("<pad>")]
    assert settings["eos_token_id"] == ends


def test_broken_tokenizer_metadata_do_not_prevent_loading(tmp_path, mentions):
    pytest.importorskip("transformers")
    model, params = model_of("llama")
    file = write(tmp_path / "t.gguf", model, params, tmp_path, tokens="qwen2")
    content = file.read_bytes()
    file.write_bytes(content.replace("Ġ he".encode(), "Ġ hf".encode()))
    with pytest.warns(UserWarning, match=r"t\.gguf"):
        _, loaded, tokenizer = hf.load(file)
    jax.tree.map(np.testing.assert_array_equal, loaded, params)
    with pytest.raises(ValueError) as info:
        tokenizer("he")
    mentions(info, "hf.load needs", file)


def test_lists_of_one_number_per_layer(tmp_path, mentions):
    model, params = model_of("llama")
    file = tmp_path / "t.gguf"
    write(file, model, params, tmp_path, more=[("add_head_count", [4, 4])])
    assert hf.model_from_config(file).config == hf.load(file)[0].config
    for name, key in (
        ("add_head_count", "llama.attention.head_count"),
        ("add_head_count_kv", "llama.attention.head_count_kv"),
        ("add_feed_forward_length", "llama.feed_forward_length"),
    ):
        write(file, model, params, tmp_path, more=[(name, [4, 2])])
        with pytest.raises(ValueError) as info:
            hf.load(file)
        mentions(info, key, "4, 2", file)


def test_a_sliding_window_of_the_metadata(tmp_path, mentions):
    for family, window, windows in (
        ("llama", 16, (16, 16)),  # of 64 positions
        ("llama", 64, None),
        ("qwen2", 64, None),
    ):
        model, params = model_of(family, qkv_bias=family == "qwen2")
        more = [("add_sliding_window", window)]
        file = write(tmp_path / "t.gguf", model, params, tmp_path, more=more)
        assert hf.load(file)[0].config.windows == windows
    file = write(file, model, params, tmp_path, more=[("add_sliding_window", 16)])
    with pytest.raises(ValueError) as info:
        hf.load(file)
    mentions(info, "qwen2.attention.sliding_window=16", file)


def test_sizes_that_are_no_numbers_are_named(tmp_path, mentions):
    model, params = model_of("llama")
    more = [("add_head_count", 0)]
    file = write(tmp_path / "t.gguf", model, params, tmp_path, more=more)
    with pytest.raises(ValueError) as info:
        hf.load(file)
    mentions(info, "llama.attention.head_count", "got 0", file)


def test_a_part_of_a_model_is_refused(tmp_path, mentions):
    model, params = model_of("llama")
    more = [("add_uint16", "split.count", 3)]
    file = write(tmp_path / "t.gguf", model, params, tmp_path, more=more)
    with pytest.raises(ValueError) as info:
        hf.load(file)
    mentions(info, file, "3", "--merge")


def test_a_folder_with_one_file_and_with_two(tmp_path, mentions):
    model, params = model_of("llama")
    folder = tmp_path / "folder"
    folder.mkdir()
    file = write(folder / "a.gguf", model, params, tmp_path)
    jax.tree.map(np.testing.assert_array_equal, hf.load(folder)[1], params)
    (folder / "b.gguf").write_bytes(file.read_bytes())
    with pytest.raises(FileNotFoundError) as info:
        hf.load(folder)
    mentions(info, "one .gguf file", "'a.gguf', 'b.gguf'")


def test_unsupported_settings_are_refused(tmp_path, mentions, monkeypatch):
    model, params = model_of("llama")
    file = write(tmp_path / "whole.gguf", model, params, tmp_path)
    content = file.read_bytes()

    bad = tmp_path / "bad.gguf"
    for data in (content[:-500], content[:300], b"nothing like it" * 9, b""):
        bad.write_bytes(data)
        with pytest.raises(ValueError) as info:
            hf.load(bad)
        mentions(info, bad)

    bad.write_bytes(content.replace(b"blk.1.attn_q.", b"blk.9.attn_q."))
    with pytest.raises(ValueError) as info:
        hf.load(bad)
    mentions(
        info, "missing: 'blk.1.attn_q.weight'", "unexpected: 'blk.9.attn_q.weight'"
    )

    bad.write_bytes(content.replace(b"llama.context_length", b"llama.context_lungth"))
    with pytest.raises(ValueError) as info:
        hf.load(bad)
    mentions(info, "needs 'llama.context_length'", bad)

    arch = len("general.architecture") + 4 + 8
    at = content.index(b"general.architecture") + arch
    bad.write_bytes(content[:at] + b"gpt2x" + content[at + 5 :])
    with pytest.raises(ValueError) as info:
        hf.load(bad)
    mentions(info, "'qwen3'", "got 'gpt2x'", "safetensors")

    experts = write(bad, model, params, tmp_path, more=[("add_expert_count", 8)])
    with pytest.raises(ValueError) as info:
        hf.load(experts)
    mentions(info, "dense", "8 experts", "from_nnx")

    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(ImportError) as info:
        hf.load(file)
    mentions(info, "gguf", "jaxunlearn[hf]")


def test_rows_are_in_hugging_face_order():
    values = np.arange(2 * 6 * 3).reshape(12, 3)
    back = _gguf._unpermute(permute(values, 2), 2)
    np.testing.assert_array_equal(back, values)
