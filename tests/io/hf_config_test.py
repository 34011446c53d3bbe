# SPDX-License-Identifier: Apache-2.0
"""config.json in both spellings, transformers' defaults, and refusals."""

import dataclasses
import json

import pytest

from jaxunlearn.io import _families, _hf_config
from jaxunlearn.models import _config

BASE = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
}


def parse(family="llama", **settings):
    return _hf_config.parse(json.dumps(BASE | {"model_type": family} | settings))


def without_source(config):
    return dataclasses.replace(config, source="{}", eos_ids=())


@pytest.mark.parametrize("family", _hf_config.FAMILIES)
def test_defaults_are_those_of_transformers(family):
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoConfig.for_model(family, **BASE)
    heads = getattr(theirs, "num_key_value_heads", 4)
    if BASE["num_attention_heads"] % heads:
        theirs.num_key_value_heads = 2
    full = json.loads(theirs.to_json_string(use_diff=False))
    kv = {"num_key_value_heads": getattr(theirs, "num_key_value_heads", 4)}
    ours = parse(family, **kv)
    assert without_source(ours) == without_source(_hf_config.parse(json.dumps(full)))


@pytest.mark.parametrize("kind", ["rope_type", "type"])
def test_both_spellings_of_rope(kind):
    inner = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    inner["original_max_position_embeddings"] = 16
    old = parse(rope_theta=5e5, rope_scaling={kind: "llama3", **inner})
    new = parse(rope_parameters={"rope_type": "llama3", "rope_theta": 5e5, **inner})
    assert without_source(old) == without_source(new)
    assert old.rope == _config.RopeConfig(
        theta=5e5, kind="llama3", factor=8.0, original_positions=16
    )


def test_original_lengths_of_rope():
    lists = {"short_factor": [1.0] * 4, "long_factor": [2.0] * 4}
    long = {"rope_type": "longrope", **lists}
    outer = {"original_max_position_embeddings": 16, "max_position_embeddings": 64}
    rope = parse(rope_scaling=long, **outer).rope
    assert (rope.original_positions, rope.factor) == (16, 4.0)
    assert rope.long_factor == (2.0,) * 4
    dynamic = {"rope_type": "dynamic", "factor": 2.0}
    rope = parse(rope_scaling=dynamic, max_position_embeddings=64).rope
    assert (rope.original_positions, rope.factor) == (64, 2.0)


def test_windows():
    assert parse("llama", sliding_window=8).windows is None
    assert parse("mistral", num_key_value_heads=2).windows == (4096,) * 3
    qwen = {"num_key_value_heads": 2, "sliding_window": 8}
    assert parse("qwen2", **qwen).windows is None
    late = parse("qwen2", use_sliding_window=True, max_window_layers=2, **qwen)
    assert late.windows == (None, None, 8)
    types = ["sliding_attention", "full_attention", "sliding_attention"]
    some = parse("qwen3", use_sliding_window=True, layer_types=types, **qwen)
    assert some.windows == (8, None, 8)


@pytest.mark.parametrize(
    "config",
    [
        parse(),
        parse(attention_bias=True, mlp_bias=True, head_dim=10),
        parse("mistral", num_key_value_heads=2, sliding_window=7),
        parse("qwen2", num_key_value_heads=2, tie_word_embeddings=True),
        parse(
            "qwen3",
            num_key_value_heads=4,
            use_sliding_window=True,
            sliding_window=5,
            max_window_layers=1,
        ),
        *(
            parse(max_position_embeddings=64, rope_scaling={"rope_type": kind, **more})
            for kind, more in {
                "linear": {"factor": 2.0},
                "dynamic": {"factor": 2.0},
                "yarn": {"factor": 2.0, "truncate": False, "beta_fast": 20.0},
                "longrope": {"short_factor": [1.0] * 4, "long_factor": [2.0] * 4},
                "llama3": {
                    "factor": 8.0,
                    "low_freq_factor": 1.0,
                    "high_freq_factor": 3.0,
                },
            }.items()
        ),
    ],
    ids=lambda c: f"{c.family}-{c.rope.kind}",
)
def test_all_settings_are_written_without_a_source(config):
    bare = without_source(config)
    text = _hf_config.write(bare, "bfloat16")
    assert without_source(_hf_config.parse(text)) == bare
    settings = json.loads(text)
    assert settings["torch_dtype"] == "bfloat16"
    assert settings["architectures"][0].lower() == f"{config.family}forcausallm"


def test_the_source_is_written_if_it_describes_the_model():
    config = parse(dtype="float16", extra=[1, 2], rope_parameters={"rope_theta": 7.0})
    written = json.loads(_hf_config.write(config, "float32"))
    assert written == json.loads(config.source) | {"dtype": "float32"}
    shorter = dataclasses.replace(config, layers=2, compute_dtype="bfloat16")
    text = _hf_config.write(shorter, "float32")
    assert json.loads(text)["extra"] == [1, 2]
    parsed = dataclasses.replace(_hf_config.parse(text), compute_dtype="bfloat16")
    assert without_source(parsed) == without_source(shorter)


def test_what_a_family_cannot_represent_is_refused(mentions):
    config = dataclasses.replace(parse(), qk_norm=True, source="{}")
    with pytest.raises(ValueError) as info:
        _hf_config.write(config, "float32")
    mentions(info, "hf.save needs", "'llama'", "qk_norm=True")
    with pytest.raises(ValueError) as info:
        _hf_config.write(dataclasses.replace(config, family="bert"), "float32")
    mentions(info, "'bert'", "'mistral'")


@pytest.mark.parametrize(
    ("settings", "parts"),
    [
        ({"model_type": "bert"}, ["'qwen3'", "got 'bert'", "models.from_nnx"]),
        ({"model_type": None}, ["model_type", "got None"]),
        ({"hidden_act": "mish"}, ["hidden_act", "'silu'", "'mish'", "from_nnx"]),
        ({"hidden_size": None}, ["'hidden_size'", "original release"]),
        (
            {"rope_scaling": {"rope_type": "mrope"}},
            ["rope_type", "'yarn'", "got 'mrope'", "from_nnx"],
        ),
        ({"rope_scaling": {"type": "linear"}}, ["'factor'", "'linear'", "original"]),
        ({"partial_rotary_factor": 0.5}, ["partial_rotary_factor", "1.0", "0.5"]),
        (
            {"rope_parameters": {"a": {"rope_theta": 1.0}, "b": {"rope_theta": 2.0}}},
            ["rope_parameters", "one set"],
        ),
        (
            {"quantization_config": {"quant_method": "gptq"}},
            ["floating-point", "'gptq'", "original release"],
        ),
        (
            {"model_type": "qwen3", "layer_types": ["linear_attention"] * 3},
            ["layer_types", "'full_attention'", "linear_attention"],
        ),
        (
            {"model_type": "qwen3", "layer_types": ["sliding_attention"] * 3},
            ["layer_types", "window size", "use_sliding_window=None"],
        ),
    ],
    ids=str,
)
def test_unsupported_settings_are_refused(mentions, settings, parts):
    with pytest.raises(ValueError) as info:
        parse(**({"family": settings.pop("model_type", "llama")} | settings))
    mentions(info, "hf.load needs", "got", *parts)


@pytest.mark.parametrize("text", ["{", "[]", ""])
def test_text_that_is_not_a_config_is_refused(mentions, text):
    with pytest.raises(ValueError) as info:
        _hf_config.parse(text)
    mentions(info, "config.json", "does not parse")


def test_end_ids_that_no_file_names_are_those_of_the_class():
    transformers = pytest.importorskip("transformers")
    for family in _hf_config.FAMILIES:
        ids = transformers.AutoConfig.for_model(family).eos_token_id
        ids = ids if isinstance(ids, list) else [ids]
        assert _families.EOS_IDS[family] == tuple(x for x in ids if x is not None)
    given = dict(model_type="phi3", vocab_size=32064, hidden_size=8)
    given |= dict(num_hidden_layers=1, num_attention_heads=2, intermediate_size=8)

    def ends(**more):
        return _hf_config.parse(json.dumps(given | more)).eos_ids

    assert ends() == (32000,)
    assert ends(vocab_size=300) == ends(eos_token_id=None) == ()
    assert (
        ends(eos_token_id=7) == ends(_generation_config={"eos_token_id": [7]}) == (7,)
    )
    assert ends(_generation_config={"bos_token_id": 1}) == (32000,)
    without = _hf_config.parse(json.dumps(given | {"eos_token_id": None}))
    default = _hf_config.parse(json.dumps(given))
    for config in (without, default):
        again = _hf_config.parse(_hf_config.write(config, "float32"))
        assert again.eos_ids == config.eos_ids
    named = dataclasses.replace(default, eos_ids=())
    assert _hf_config.parse(_hf_config.write(named, "float32")).eos_ids == ()
