# SPDX-License-Identifier: Apache-2.0
"""Benchmarks as records, through tensorflow-datasets; skipped where it is absent."""

import json
import pickle
import subprocess
import sys

import pytest

pytest.importorskip("tensorflow_datasets")
import tensorflow_datasets as tfds

from jaxunlearn import data
from jaxunlearn.data.benchmarks import builders, capitals, lume, mmlu, rtt_facts, tofu
from tests import tiny
from tests.architecture import ROOT
from tests.data.official_test import DATA, PERTURBED, QA, lines, there


@pytest.fixture
def folder(tmp_path):
    place = tmp_path / "files" / "tofu"
    place.mkdir(parents=True)
    rows = [
        PERTURBED | {"question": f"{i}?", "perturbed_answer": ["é"] * (i % 3)}
        for i in range(50)
    ]
    (place / "forget01_perturbed.json").write_text(lines(*rows), encoding="utf-8")
    return tmp_path / "files"


def test_records_equal_the_rows_of_the_reader_in_order(folder, tmp_path):
    options = dict(cache=tmp_path / "cache", check=False)
    rows = tofu.read("forget01_perturbed", folder, check=False)
    records = builders.source("tofu", "forget01_perturbed", folder, **options)
    assert len(records) == 50
    assert [records[i] for i in (49, 0, 7)] == [rows[i] for i in (49, 0, 7)]
    assert [records[i] for i in range(50)] == rows
    assert list(tmp_path.glob("cache/**/*.array_record-*"))
    assert pickle.loads(pickle.dumps(records))[3] == rows[3]  # for grain's workers
    again = builders.source("tofu", "forget01_perturbed", folder, **options)
    assert again[49] == rows[49]


def test_records_of_other_content_are_never_used(folder, tmp_path):
    options = dict(cache=tmp_path / "cache", check=False)
    builders.source("tofu", "forget01_perturbed", folder, **options)
    path = folder / "tofu" / "forget01_perturbed.json"
    path.write_text(lines(PERTURBED), encoding="utf-8")
    records = builders.source("tofu", "forget01_perturbed", folder, **options)
    assert [records[i] for i in range(len(records))] == [PERTURBED]
    with pytest.raises(ValueError, match="needs 40 rows, got 1"):
        builders.source("tofu", "forget01_perturbed", folder, cache=tmp_path / "cache")


def test_missing_files_and_names_are_errors(tmp_path):
    with pytest.raises(FileNotFoundError, match="lume forget needs forget.jsonl"):
        builders.source("lume", "forget", tmp_path, cache=tmp_path)
    with pytest.raises(ValueError, match="Did you mean 'lume'"):
        builders.source("lune", "forget", tmp_path, cache=tmp_path)
    with pytest.raises(ValueError, match="table.*'forget', 'retain'.*'validation'"):
        builders.source("lume", "validation", tmp_path, cache=tmp_path)


def test_generated_tables_need_no_file(tmp_path):
    born = builders.source("rtt_facts", "birthdays", cache=tmp_path)
    assert [born[i] for i in range(len(born))] == rtt_facts.birthdays()
    packaged = builders.source("capitals", "capitals", cache=tmp_path)
    assert [packaged[i]["subject"] for i in range(len(packaged))] == [
        fact.subject for fact in capitals.capitals()
    ]


def test_tfds_alone_finds_every_builder_and_its_manual_folder(folder, tmp_path):
    names = ("tofu", "lume", "muse", "wmdp", "mmlu", "rtt_facts", "capitals")
    names += ("local_fashion_mnist", "local_cifar10", "local_cifar10_subset")
    assert set(names) == set(builders.BENCHMARKS)
    for name in names:
        found = tfds.builder(name, data_dir=tmp_path / "tfds")
        assert found.info.citation and found.info.homepage and found.name == name
        assert len(found.BUILDER_CONFIGS) == len(builders.BENCHMARKS[name][0].tables)
    place = folder / "tofu"
    (place / "real_authors_perturbed.json").write_text(
        lines(*[QA | {"perturbed_answer": ["a", "b", "c"]}] * 100)
    )
    one = tfds.builder(
        "tofu/real_authors_perturbed",
        data_dir=tmp_path / "tfds",
        file_format="array_record",
    )
    manual = tfds.download.DownloadConfig(manual_dir=folder)
    with pytest.raises(ValueError, match="checksum"):  # 100 rows, but not the real ones
        one.download_and_prepare(download_config=manual)
    born = tfds.builder(
        "rtt_facts/birthdays", data_dir=tmp_path / "tfds", file_format="array_record"
    )
    born.download_and_prepare()
    first = born.as_data_source(split="train")[0]
    assert first["name"].decode() == rtt_facts.birthdays()[0]["name"]


def test_records_are_encoded_and_batched(folder, tmp_path):
    records = builders.source(
        "tofu", "forget01_perturbed", folder, cache=tmp_path / "cache", check=False
    )
    tokenizer = tiny.tiny_tokenizer()
    rows = data.encoded(records, tokenizer, length=64, prompt="question")
    batch = next(data.streams({"forget": rows}, 4, seed=0))["forget"]
    assert batch["tokens"].shape == (4, 64) and batch["answer"].any(1).all()


def test_tensorflow_is_never_imported(folder, tmp_path):
    program = (
        "import json, sys\n"
        "import jaxunlearn, jaxunlearn.data\n"
        "early = 'tensorflow_datasets' in sys.modules or 'pyarrow' in sys.modules\n"
        "from jaxunlearn.data.benchmarks import builders\n"
        "s = builders.source('tofu', 'forget01_perturbed', sys.argv[1],"
        " cache=sys.argv[2], check=False)\n"
        "print(json.dumps([early, s[49]['question'], 'tensorflow' in sys.modules]))"
    )
    run = [sys.executable, "-c", program, str(folder), str(tmp_path / "cache")]
    done = subprocess.run(run, cwd=ROOT, check=True, capture_output=True, text=True)
    assert json.loads(done.stdout.splitlines()[-1]) == [False, "49?", False]


@there("tofu", "full.jsonl")
@there("lume", "forget.jsonl")
@there("mmlu", "dev.jsonl.gz")
@pytest.mark.parametrize(
    "name, which, read",
    [
        ("tofu", "forget10_perturbed", tofu.read),
        ("lume", "forget", lume.read),
        ("mmlu", "dev", mmlu.read),
    ],
)
def test_the_published_tables_survive_the_round_trip(name, which, read, tmp_path):
    records = builders.source(name, which, DATA, cache=tmp_path)
    assert [records[i] for i in range(len(records))] == read(which, DATA)
