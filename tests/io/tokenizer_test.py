# SPDX-License-Identifier: Apache-2.0
"""Tokenizers of folders: the file decides, and a broken one does not stop the weights.

The reference for tokens is the `tokenizers` library itself, reading tokenizer.json.
"""

import copy
import json
import sys
import warnings

import numpy as np
import pytest

from jaxunlearn.io import _tokenizer, hf

tokenizers = pytest.importorskip("tokenizers")
transformers = pytest.importorskip("transformers")

CL100K = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
TEXT = "I'LL say 12345678\n\nhello, born 1967"


def core(rule, *, begin=False):
    """A byte-level Tokenizer with this word rule, or of single digits."""
    from tokenizers import decoders, models, pre_tokenizers, processors, trainers

    byte = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=rule is None)
    first = pre_tokenizers.Digits(individual_digits=True)
    if rule is not None:
        first = pre_tokenizers.Split(tokenizers.Regex(rule), "isolated")
    made = tokenizers.Tokenizer(models.BPE())
    made.decoder = decoders.ByteLevel()
    made.pre_tokenizer = pre_tokenizers.Sequence([first, byte])
    made.train_from_iterator(
        ["hello world born in 1967 1234 12 5678 I'LL SAY\n\n don't "] * 5,
        trainers.BpeTrainer(
            vocab_size=330,
            special_tokens=["</s>", "<s>"],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    if begin:
        made.post_processor = processors.TemplateProcessing(
            single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", 1)]
        )
    return made


CORES = {
    name: core(rule, begin=begin)
    for name, rule, begin in (
        ("three", CL100K, False),
        ("three, begin", CL100K, True),
        ("one", CL100K.replace("{1,3}", ""), False),
        ("single, begin", None, True),
    )
}


def place(folder, model_type, made, **config):
    """Writes a folder's configs and tokenizer.json."""
    (folder / "config.json").write_text(json.dumps({"model_type": model_type}))
    if made is not None:
        made.save(str(folder / "tokenizer.json"))
    config = {"bos_token": "<s>", "eos_token": "</s>"} | config
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


def read(folder):
    """The tokenizer of a folder, and the messages of our warnings."""
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        found = _tokenizer.load(folder)
    return found, [str(w.message) for w in seen if str(folder) in str(w.message)]


@pytest.mark.parametrize(
    ("model_type", "kind", "name"),
    [
        ("llama", "GPT2Tokenizer", "three"),
        ("llama", "LlamaTokenizerFast", "three, begin"),
        ("llama", "PreTrainedTokenizerFast", "one"),
        ("phi3", "GPT2Tokenizer", "three, begin"),
        ("qwen2", "LlamaTokenizerFast", "one"),
        ("qwen2", None, "single, begin"),
        ("qwen3", "Qwen2Tokenizer", "three"),
        ("gpt_neox", "GPTNeoXTokenizerFast", "three, begin"),
        ("gemma", "GemmaTokenizer", "single, begin"),
        ("mistral", "LlamaTokenizer", "three"),
        ("unheard-of", "NoSuchTokenizer", "three, begin"),
    ],
)
def test_tokens_are_those_of_tokenizer_json(tmp_path, model_type, kind, name):
    made = CORES[name]
    place(tmp_path, model_type, made, tokenizer_class=kind)
    found, _ = read(tmp_path)
    for text in (TEXT, *_tokenizer.PROBES):
        assert found(text)["input_ids"] == made.encode(text).ids
        ids = found(text, add_special_tokens=False)["input_ids"]
        assert ids == made.encode(text, add_special_tokens=False).ids
        assert found.decode(ids) == made.decode(ids, skip_special_tokens=False)
    assert (found.bos_token, found.eos_token) == ("<s>", "</s>")
    found.save_pretrained(tmp_path / "saved")
    again = tokenizers.Tokenizer.from_file(str(tmp_path / "saved" / "tokenizer.json"))
    assert again.encode(TEXT).ids == made.encode(TEXT).ids


def test_another_rule_of_transformers_is_reported(tmp_path):
    place(tmp_path, "llama", CORES["three"], tokenizer_class="GPT2Tokenizer")
    built = transformers.AutoTokenizer.from_pretrained(tmp_path)
    ids = CORES["three"].encode(TEXT).ids
    _, seen = read(tmp_path)
    differs = built(TEXT, add_special_tokens=False)["input_ids"] != ids
    assert len(seen) == differs  # depends on the version of transformers
    place(tmp_path, "llama", CORES["three"], tokenizer_class="PreTrainedTokenizerFast")
    assert read(tmp_path)[1] == []


@pytest.mark.parametrize("kind", ["GPT2Tokenizer", "PreTrainedTokenizerFast"])
def test_stored_limits_of_length_hide_no_difference(tmp_path, kind):
    limited = tokenizers.Tokenizer.from_str(CORES["three, begin"].to_str())
    limited.enable_truncation(3)
    limited.enable_padding(length=5)
    plain, stored = tmp_path / "plain", tmp_path / "stored"
    found = {}
    for folder, made in ((plain, CORES["three, begin"]), (stored, limited)):
        folder.mkdir()
        place(folder, "llama", made, tokenizer_class=kind, add_bos_token=False)
        found[folder] = read(folder)
    seen = {
        folder: [m.replace(str(folder), "") for m in x[1]]
        for folder, x in found.items()
    }
    assert seen[stored] == seen[plain] and len(seen[plain]) == 1
    ids = CORES["three, begin"].encode(TEXT).ids
    assert all(x[0](TEXT)["input_ids"] == ids for x in found.values())


def test_templates_and_names_of_other_files_are_read(tmp_path):
    made = tokenizers.Tokenizer.from_str(CORES["three, begin"].to_str())
    made.enable_truncation(4)
    settings = {"tokenizer_class": "GPT2Tokenizer", "model_max_length": 77}
    place(tmp_path, "qwen2", made, add_bos_token=True, **settings)
    (tmp_path / "chat_template.jinja").write_text("{{ messages[0]['content'] }}!")
    found, _ = read(tmp_path)
    chat = [{"role": "user", "content": "hello"}]
    assert found.apply_chat_template(chat, tokenize=False) == "hello!"
    assert found.model_max_length == 77
    assert found(TEXT)["input_ids"] == CORES["three, begin"].encode(TEXT).ids


@pytest.mark.parametrize("given", [True, False])
def test_begin_tokens_that_the_config_denies_are_reported(tmp_path, given):
    made = CORES["three" if given else "three, begin"]
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "add_bos_token": given}
    place(tmp_path, "llama", made, **settings)
    found, (message,) = read(tmp_path)
    assert found(TEXT)["input_ids"] == made.encode(TEXT).ids
    assert f"add_bos_token={given}" in message


@pytest.mark.parametrize("kind", ["QWenTokenizer", "GPT2Tokenizer"])
@pytest.mark.parametrize("form", [list, dict])
def test_code_of_a_checkpoint_is_not_run(tmp_path, monkeypatch, kind, form):
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("a question"))
    mapped = ["tokenization_x.X", None]
    mapped = mapped if form is list else {"AutoTokenizer": mapped}
    (tmp_path / "tokenization_x.py").write_text("raise SystemExit(3)")
    place(tmp_path, "llama", CORES["one"], tokenizer_class=kind, auto_map=mapped)
    found, _ = read(tmp_path)
    assert found(TEXT)["input_ids"] == CORES["one"].encode(TEXT).ids
    found.save_pretrained(tmp_path / "saved")
    assert "auto_map" not in (tmp_path / "saved/tokenizer_config.json").read_text()

    (tmp_path / "tokenizer.json").unlink()
    CORES["one"].model.save(str(tmp_path))  # vocab.json and merges.txt
    if kind == "GPT2Tokenizer":
        found, _ = read(tmp_path)
        assert found("hello world")["input_ids"]
    place(tmp_path, "llama", None, tokenizer_class="QWenTokenizer", auto_map=mapped)
    found, seen = read(tmp_path)
    with pytest.raises(ValueError, match="auto_map.*tokenization_x"):
        found("a")
    assert len(seen) == 1


BROKEN = {
    "tokenizer.json": ({"tokenizer.json": "{", "tokenizer_config.json": "{}"}),
    "without a type": {"tokenizer.json": '{"model": {"vocab": 3}}'},
    "no vocabulary": {"tokenizer_config.json": '{"tokenizer_class": "LlamaTokenizer"}'},
    "no merges": {"vocab.json": '{"a": 0}', "tokenizer_config.json": "{}"},
    "config": {"vocab.json": "{}", "merges.txt": "", "tokenizer_config.json": '{"a'},
    "a list": {"vocab.json": "{}", "merges.txt": "", "tokenizer_config.json": "[]"},
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_tokenizer_does_not_prevent_loading(tiny, tmp_path, mentions, name):
    model, params = tiny
    hf.save(model, params, tmp_path)
    for file, text in BROKEN[name].items():
        (tmp_path / file).write_text(text)
    with pytest.warns(UserWarning, match=str(tmp_path)):
        _, loaded, tokenizer = hf.load(tmp_path)
    np.testing.assert_array_equal(
        loaded["final_norm"]["scale"], params["final_norm"]["scale"]
    )
    for use in (
        lambda: tokenizer("a"),
        lambda: tokenizer.encode("a"),
        lambda: tokenizer.eos_token_id,
        lambda: len(tokenizer),
        lambda: copy.copy(tokenizer).pad_token,
    ):
        with pytest.raises(ValueError) as info:
            use()
        mentions(info, "hf.load", tmp_path)
    with pytest.warns(UserWarning, match="without a tokenizer"):
        hf.save(model, params, tmp_path / "saved", tokenizer=tokenizer)
    assert hf.load(tmp_path / "saved")[2] is None


def test_sentencepiece_that_is_not_installed_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "sentencepiece", None)
    (tmp_path / "tokenizer.model").write_bytes(b"\n\x0e\n\x05<unk>")
    found, seen = read(tmp_path)
    assert "pip install sentencepiece" in seen[0]
    with pytest.raises(ImportError, match=r"tokenizer\.model"):
        found("a")


def test_a_sentencepiece_model_alone_is_read(tmp_path):
    sentencepiece = pytest.importorskip("sentencepiece")
    text = tmp_path / "text.txt"
    text.write_text("hello world born in 1967\nthe capital of France is Paris\n" * 20)
    sentencepiece.SentencePieceTrainer.train(
        input=str(text),
        model_prefix=str(tmp_path / "tokenizer"),
        vocab_size=60,
        model_type="bpe",
        minloglevel=2,
    )
    place(tmp_path, "llama", None, tokenizer_class="LlamaTokenizer")
    reference = sentencepiece.SentencePieceProcessor(
        model_file=str(tmp_path / "tokenizer.model")
    )
    found, seen = read(tmp_path)
    ids = found("hello Paris", add_special_tokens=False)["input_ids"]
    assert ids == reference.encode("hello Paris")
    assert seen == []


@pytest.mark.parametrize("name", ["chat_template.jinja", "chat_template.json"])
def test_a_chat_template_in_a_separate_file_is_read(tmp_path, name):
    place(tmp_path, "llama", CORES["one"], tokenizer_class="LlamaTokenizer")
    template = "{% for m in messages %}[{{ m['content'] }}]{% endfor %}"
    text = json.dumps({"chat_template": template})
    (tmp_path / name).write_text(template if name.endswith("jinja") else text)
    found, _ = read(tmp_path)
    assert found.chat_template == template


def test_the_map_to_code_is_not_saved(tiny, tmp_path):
    model, params = tiny
    hf.save(model, params, tmp_path)
    settings = json.loads((tmp_path / "config.json").read_text())
    settings["auto_map"] = {"AutoModelForCausalLM": "modeling_x.X"}
    (tmp_path / "config.json").write_text(json.dumps(settings))
    again, loaded, _ = hf.load(tmp_path)
    hf.save(again, loaded, tmp_path / "saved")
    assert "auto_map" not in json.loads((tmp_path / "saved/config.json").read_text())


def test_tokens_without_a_row_of_the_embedding_are_reported(tiny, tmp_path):
    model, params = tiny  # of 64 rows
    hf.save(model, params, tmp_path)
    vocabulary = {f"w{i}": i for i in range(62)} | {"far": 70}
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, "w0"))
    made.save(str(tmp_path / "tokenizer.json"))
    with pytest.warns(UserWarning, match="64 rows.*up to id 70: 'far' have no row"):
        _, _, tokenizer = hf.load(tmp_path)
    assert tokenizer("far")["input_ids"] == [70]
    # Without an unknown token, so that not every text has tokens.
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary | {"far": 63}))
    made.save(str(tmp_path / "tokenizer.json"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        _, _, tokenizer = hf.load(tmp_path)
    assert tokenizer("far")["input_ids"] == [63]
