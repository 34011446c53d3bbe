# SPDX-License-Identifier: Apache-2.0
"""Benchmarks as array_record, through tensorflow-datasets but without TensorFlow.

    forget = builders.source("tofu", "forget10_perturbed", folder)
    len(forget), forget[3]["perturbed_answer"]

    tfds.builder("tofu/forget10", file_format="array_record")   # the same, with tfds

Importing this module needs the extra `data` and registers the builders `tofu`, `lume`,
`muse`, `wmdp`, `mmlu`, `rtt_facts`, `capitals` and, for images, `local_fashion_mnist`,
`local_cifar10` and `local_cifar10_subset` (tfds has builders without `local_`, see
`tfds_images`). Every table is a config of its builder ("news/raw/forget" becomes
"news_raw_forget") with one split, "train", in the order of its file. `source` returns
rows as the readers do; tfds itself returns texts as bytes.
"""

import dataclasses
import hashlib
import os
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from jaxunlearn import _checks
from jaxunlearn.data import images
from jaxunlearn.data import source as sources
from jaxunlearn.data import table as tables
from jaxunlearn.data.benchmarks import (
    capitals,
    image_sets,
    lume,
    mmlu,
    muse,
    official,
    rtt_facts,
    tofu,
    wmdp,
)

tfds = _checks.library("data.benchmarks.builders", "tensorflow_datasets", "data")

SPLIT = "train"
FORMAT = "array_record"


def _capitals() -> official.Rows:
    return [
        {
            "subject": fact.subject,
            "answer": fact.answer,
            "aliases": list(fact.aliases),
            "group": fact.group,
        }
        for fact in capitals.capitals()
    ]


CAPITALS = official.Benchmark(
    name="capitals",
    tables={
        "capitals": official.Table(
            (),
            {"subject": "text", "answer": "text", "aliases": "texts", "group": "text"},
            make=_capitals,
        )
    },
    home="jaxunlearn, in data/benchmarks/capitals.json",
    licence="Apache-2.0",
    citation="Packaged with jaxunlearn.",
)

# Name -> the benchmark, and the reader of its tables.
BENCHMARKS: Mapping[str, tuple[official.Benchmark, Callable[..., official.Rows]]] = {
    module.BENCHMARK.name: (module.BENCHMARK, module.read)
    for module in (tofu, lume, muse, wmdp, mmlu, rtt_facts)
} | {
    name: (benchmark, benchmark.read)
    for name, benchmark in {
        "capitals": CAPITALS,
        **{f"local_{name}": each for name, each in image_sets.BENCHMARKS.items()},
    }.items()
}


def source(
    name: str,
    table: str,
    folder: str | os.PathLike | None = None,
    *,
    cache: str | os.PathLike | None = None,
    check: bool = True,
    download: bool = False,
) -> tables.Source:
    """A table's rows as a source that reads array_record, not held in memory.

    The first call for a file writes the records. Later calls only hash the file, so
    records of another file are never used for it.

    Args:
        name: the benchmark, a key of BENCHMARKS such as "tofu" or
            "local_fashion_mnist".
        table: the table.
        folder, check, download: as for Benchmark.read.
        cache: where records are written; ~/tensorflow_datasets by default.
    Returns:
        A source for data.encoded and data.loader, with the rows of the reader: texts as
        str, integers as int, lists of texts as lists.
    Raises:
        FileNotFoundError, ValueError: as Benchmark.read.
    """
    _checks.one_of("builders.source", tuple(BENCHMARKS), name=name)
    benchmark, read = BENCHMARKS[name]
    _checks.one_of(f"builders.source of {name}", tuple(benchmark.tables), table=table)
    about = benchmark.tables[table]
    if about.make is not None:
        key = official.digest(about.make())[:16]
    else:
        path = official.find(benchmark, table, folder, download=download)
        key = _hash(path)[:16]
    key = key if check else f"{key}-unchecked"
    root = Path(cache or tfds.core.constants.DATA_DIR).expanduser() / "jaxunlearn"
    builder = _BUILDERS[name](
        config=config_name(table), data_dir=root / key, file_format=FORMAT
    )
    builder.read = partial(read, table, folder, check=check)
    builder.download_and_prepare()
    records = builder.as_data_source(split=SPLIT)
    return sources.mapped(records, partial(_decode, about.columns))


def tfds_images(
    name: str, split: str, *, data_dir: str | os.PathLike | None = None
) -> tables.Table:
    """A table of images from a builder of tfds, such as "cifar10" or "fashion_mnist".

    tfds downloads missing files; `image_sets.read` reads local files instead.

    Args:
        name: a builder whose rows have an `image` and a `label`.
        split: such as "train" or "test[:1000]".
        data_dir: where records are written; ~/tensorflow_datasets by default.
    """
    builder = tfds.builder(name, data_dir=data_dir, file_format=FORMAT)
    builder.download_and_prepare()
    rows = builder.as_data_source(split=split)
    pixels = np.stack([row["image"] for row in rows])
    labels = np.array([row["label"] for row in rows])
    return images.table(
        pixels, labels, classes=builder.info.features["label"].num_classes
    )


def config_name(table: str) -> str:
    """A table's name as tfds needs it: "news/raw/forget" becomes "news_raw_forget"."""
    return table.replace("/", "_").replace(" ", "_")


@dataclasses.dataclass(eq=False)
class Config(tfds.core.BuilderConfig):
    """The config of a table; `table` is its name in this package."""

    table: str = ""


class _Builder(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    """Writes the rows of one table, in order, as tfds's records."""

    VERSION = tfds.core.Version("1.0.0")
    MANUAL_DOWNLOAD_INSTRUCTIONS = "Give the folder that contains FOLDER/NAME/."
    benchmark: official.Benchmark
    read: Callable[[], official.Rows] | None = None  # set by source()

    def _info(self) -> tfds.core.DatasetInfo:
        about = self.benchmark
        columns = about.tables[self.builder_config.table].columns
        return tfds.core.DatasetInfo(
            builder=self,
            description=f"{about.name} {self.builder_config.table}, from {about.home}",
            features=tfds.features.FeaturesDict(
                {name: _FEATURES[kind]() for name, kind in columns.items()}
            ),
            homepage=about.home,
            citation=about.citation,
            license=about.licence,
            disable_shuffling=True,  # otherwise rows are in the order of their hashes
        )

    def _split_generators(self, manager: Any) -> dict[str, Any]:
        if self.read is not None:
            rows = self.read()
        else:  # called by tfds: use its manual folder, or else JAXUNLEARN_DATA
            try:
                folder = manager.manual_dir
            except AssertionError:  # tfds has no manual folder
                folder = None
            read = BENCHMARKS[self.benchmark.name][1]
            rows = read(self.builder_config.table, folder)
        return {SPLIT: self._generate_examples(rows)}

    def _generate_examples(self, rows: official.Rows) -> Any:
        yield from enumerate(rows)


_FEATURES = {
    "text": tfds.features.Text,
    "int": lambda: np.int64,
    "texts": lambda: tfds.features.Sequence(tfds.features.Text()),
    "image": lambda: tfds.features.Tensor(
        shape=(None, None, None), dtype=np.uint8, encoding="zlib"
    ),
}
_DECODED = {
    "text": lambda value: value.decode(),
    "int": int,
    "texts": lambda values: [value.decode() for value in values],
    "image": np.asarray,
}


def _decode(columns: Mapping[str, str], record: Mapping[str, Any]) -> dict[str, Any]:
    return {name: _DECODED[kind](record[name]) for name, kind in columns.items()}


def _hash(path: Path) -> str:
    """SHA-256 of a file, or of all files of a folder and their names."""
    files = sorted(x for x in path.rglob("*") if x.is_file()) if path.is_dir() else ()
    total = hashlib.sha256(path.name.encode())
    for each in files or (path,):
        with open(each, "rb") as stream:
            total.update(each.name.encode())
            total.update(hashlib.file_digest(stream, "sha256").digest())
    return total.hexdigest()


def _builder(name: str) -> type[_Builder]:
    """The builder class that tfds registers under this name."""
    benchmark = BENCHMARKS[name][0]
    words = "".join(part.capitalize() for part in name.split("_"))
    configs = [Config(name=config_name(t), table=t) for t in benchmark.tables]
    fields = {"benchmark": benchmark, "BUILDER_CONFIGS": configs, "name": name}
    return type(words, (_Builder,), fields | {"__module__": __name__})


# Module-level names, so that records can be pickled for other processes.
Tofu, Lume, Muse = _builder("tofu"), _builder("lume"), _builder("muse")
Wmdp, Mmlu = _builder("wmdp"), _builder("mmlu")
RttFacts, Capitals = _builder("rtt_facts"), _builder("capitals")
LocalFashionMnist = _builder("local_fashion_mnist")
LocalCifar10, LocalCifar10Subset = (
    _builder("local_cifar10"),
    _builder("local_cifar10_subset"),
)
_BUILDERS = {
    each.name: each
    for each in (
        *(Tofu, Lume, Muse, Wmdp, Mmlu, RttFacts, Capitals),
        *(LocalFashionMnist, LocalCifar10, LocalCifar10Subset),
    )
}
