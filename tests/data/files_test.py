# SPDX-License-Identifier: Apache-2.0
import gzip
import json

import pytest
import tokenizers
import transformers

from jaxunlearn import data
from jaxunlearn.data import files
from tests import tiny

ROWS = [{"question": 'Say "a, b"', "answer": "á\nb"}, {"question": "2?", "answer": ""}]
CSV = 'question,answer\r\n"Say ""a, b""","á\nb"\r\n2?,\r\n'


@pytest.fixture
def write(tmp_path):
    def write(name, content):
        path = tmp_path / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    return write


@pytest.mark.parametrize(
    "name, content",
    [
        ("a.csv", CSV),
        ("a.csv", "\ufeff" + CSV),
        ("a.csv.gz", gzip.compress(CSV.encode(), mtime=0)),
        ("a.json", json.dumps(ROWS)),
        ("a.json", "\n".join(json.dumps(row) for row in ROWS)),
        ("a.jsonl", "\n".join(json.dumps(row) for row in ROWS)),
    ],
)
def test_every_ending_gives_the_same_rows(write, name, content):
    assert files.read_rows(write(name, content), ("question", "answer")) == ROWS


def test_parquet_gives_the_same_rows(tmp_path, write):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    rows = [row | {"choices": ["a", "b"], "n": 3} for row in ROWS]
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet")
    assert files.read_rows(tmp_path / "a.parquet", ("n",)) == rows
    with pytest.raises(ValueError, match="row 0: needs 'm', but the row has"):
        files.read_rows(tmp_path / "a.parquet", ("m",))
    with pytest.raises(ValueError, match="broken.parquet needs to be a Parquet file"):
        files.read_rows(write("broken.parquet", "PAR1 and no more"))


def test_a_folder_of_hugging_face_gives_the_same_rows(tmp_path, write):
    datasets = pytest.importorskip("datasets")
    rows = [row | {"choices": ["a", "b"], "n": 3} for row in ROWS * 3]
    full = datasets.Dataset.from_list(rows)
    full.save_to_disk(tmp_path / "one", num_shards=2)
    assert files.read_rows(tmp_path / "one", ("question", "n")) == rows
    # A view of other rows in another order is written as it is seen.
    full.select([4, 1]).save_to_disk(tmp_path / "view")
    assert files.read_rows(tmp_path / "view") == [rows[4], rows[1]]
    splits = datasets.DatasetDict({"train": full, "test": full.select([1])})
    splits.save_to_disk(tmp_path / "two")
    assert files.read_rows(tmp_path / "two" / "test") == [rows[1]]
    with pytest.raises(ValueError, match="splits 'train', 'test', .*two/train"):
        files.read_rows(tmp_path / "two")
    with pytest.raises(ValueError, match="one, row 0: needs 'm', but the row has"):
        files.read_rows(tmp_path / "one", ("m",))
    texts = [{"text": "One."}, {"text": "Two."}]
    datasets.Dataset.from_list(texts).save_to_disk(tmp_path / "texts")
    assert files.read_texts(tmp_path / "texts") == texts
    (shard, *_) = (tmp_path / "one").glob("*.arrow")
    shard.write_bytes(shard.read_bytes()[:40])
    with pytest.raises(
        ValueError, match="arrow needs to be complete.* Copy the folder"
    ):
        files.read_rows(tmp_path / "one")


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("a.csv", "question,answer\n", "has no rows"),
        ("a.csv", "", "has no rows"),
        ("a.csv", "question,answer\na,b,c\n", "line 2: needs 2 values"),
        ("a.csv", "question,answer\na,b\nc\n", "line 3: needs 2 values"),
        ("a.csv", 'question,answer\n"a"b,c\n', "line 2: needs CSV"),
        ("a.csv", "question,reply\na,b\n", "line 2: needs 'answer', but the row has"),
        ("a.csv", b"question,answer\n\xe9,b\n", "UTF-8 text, but byte 16 is not"),
        ("a.json", "[]", "has no rows"),
        ("a.json", "[1]", "row 0: .*got a int"),
        ("a.json", '[{"a": 1},]', "line 1: needs a JSON list"),
        ("a.txt", "hello", "a file that ends in one of '.jsonl'"),
    ],
)
def test_bad_files_are_named(write, name, content, message):
    with pytest.raises(ValueError, match=message) as error:
        files.read_rows(write(name, content), ("question", "answer"))
    assert name in str(error.value)


def test_a_missing_file_and_a_folder_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="none.csv does not exist"):
        files.read_rows(tmp_path / "none.csv")
    (tmp_path / "a.csv").mkdir()
    with pytest.raises(FileNotFoundError, match="a.csv is a folder"):
        files.read_rows(tmp_path / "a.csv")
    with pytest.raises(FileNotFoundError, match="none.txt does not exist"):
        files.read_texts(tmp_path / "none.txt")


def test_compressed_lines_cannot_be_opened_as_a_source(write):
    path = write("a.jsonl.gz", gzip.compress(b'{"a": 1}\n'))
    assert data.read_jsonl(path) == [{"a": 1}]
    with pytest.raises(
        ValueError, match="open_jsonl needs an uncompressed file.*Decompress it"
    ):
        data.open_jsonl(path)


def test_texts_without_columns(write):
    text = "One.\n\nTwo.\n"
    assert files.read_texts(write("a.txt", text)) == [{"text": text}]
    both = [{"text": "One."}, {"text": "Two."}]
    assert files.read_texts(write("a.txt", text), lines=True) == both
    assert files.read_texts(write("a.json", '["One.", "Two."]')) == both
    assert files.read_texts(write("b.json", json.dumps(both))) == both
    assert files.read_texts(write("c.csv", "text\nOne.\nTwo.\n")) == both
    with pytest.raises(ValueError, match="has no texts"):
        files.read_texts(write("a.txt", " \n"))


def test_columns_are_lists_ready_to_encode():
    assert files.columns(ROWS, "question") == ([row["question"] for row in ROWS],)
    with pytest.raises(KeyError, match="the column 'q', but there is 'question'"):
        files.columns(ROWS, "q")


def test_ids_in_both_sets_are_reported(recwarn):
    forget = [{"id": i} for i in ("a", "b", "c", "b")]
    assert data.overlap(forget[:3], [{"id": "d"}]) == []
    assert not recwarn
    with pytest.warns(UserWarning) as caught:
        both = data.overlap(forget, [{"id": i} for i in ("b", "d", "a")])
    assert both == ["a", "b"]
    repeated, shared = (str(warning.message) for warning in caught)
    assert (
        "1 of the values of 'id' occur more than once in the forget set: 'b'"
        in repeated
    )
    assert "2 of the values of 'id' are in both the forget and" in shared
    assert "'a', 'b'" in shared
    with pytest.raises(KeyError, match="The retain set reads the column 'id'"):
        data.overlap(forget, [{"question": "a"}])


def test_long_rows_are_counted_and_never_truncated():
    tokenizer = tiny.tiny_tokenizer()
    rows = [{"prompt": "The capital of France is", "answer": "Paris."}] * 2
    rows.insert(1, {"prompt": "The capital of France is " * 9, "answer": "Paris."})
    short, long = (
        len(tokenizer(f"{row['prompt']} {row['answer']}")["input_ids"])
        for row in rows[:2]
    )
    with pytest.warns(UserWarning, match=rf"1 of 3 rows .* \(row 1 has {long}\)"):
        short_rows = data.drop_long(rows, tokenizer, max_length=short)
    assert short_rows == [rows[0], rows[2]]
    assert data.drop_long(rows, tokenizer, max_length=long) == rows
    table = data.encode(tokenizer, *data.columns(short_rows, "prompt", "answer"))
    assert table["mask"].sum(1).tolist() == [short, short]
    with pytest.raises(ValueError, match=r"\(1 of 3 rows are too long\)"):
        data.encode(tokenizer, *data.columns(rows, "prompt", "answer"), length=long - 1)
    with pytest.raises(ValueError, match="needs a row that fits, but 3 of 3 rows"):
        data.drop_long(rows, tokenizer, max_length=short - 1)


def test_an_answer_without_tokens_is_refused():
    words = {"[UNK]": 0, "a": 1, "snowman": 2, "▁": 3, "is": 4, "x": 5}
    model = tokenizers.models.WordLevel(words, unk_token="[UNK]")
    backend = tokenizers.Tokenizer(model)
    backend.normalizer = tokenizers.normalizers.Replace("☃", "")
    backend.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    spaced = tokenizers.Tokenizer(model)
    spaced.normalizer = backend.normalizer
    spaced.pre_tokenizer = tokenizers.pre_tokenizers.Split(" ", "isolated")
    for each in (backend, spaced):  # without and with a token for the space before it
        fast = transformers.PreTrainedTokenizerFast(
            tokenizer_object=each, unk_token="[UNK]"
        )
        assert data.encode(fast, ["a"], ["x"])["answer"].any()
        with pytest.raises(ValueError, match=r"'☃' in row 1 \(1 of 2"):
            data.encode(fast, ["a", "a snowman is"], ["x", "☃"])
