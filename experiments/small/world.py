# SPDX-License-Identifier: Apache-2.0
"""Makes the small world, once: a model that knows every author, and a retrained one.

    python -m experiments.small.world --config=experiments/small/configs/tofu.py

The retrained model starts from the same seed and takes as many steps, but sees only the
rows to retain: what the original should have become had it never seen the others. The
world is saved in `<output>/<digest>`, by a digest of the config, the questions and
VERSION:

    original/, retrained/    folders that hf.load reads, with the tokenizer
    questions.json           {"forget": rows, "retain": rows}
    world.json               the config, times and last losses

The folder appears when it is complete. A process that was stopped resumes from its last
checkpoint by the same command; of two processes one waits for the other.
"""

import fcntl
import hashlib
import json
import os
import shutil
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import optax
from ml_collections import ConfigDict

import jaxunlearn as ju
from experiments.shared import command, page
from experiments.small import questions
from jaxunlearn import _checks, models, recipes
from jaxunlearn.data import table
from jaxunlearn.io import checkpoint, hf, preempt
from jaxunlearn.typing import Model, Params

CONFIG = "experiments/small/configs/biographies.py"
VERSION = 2
"""Part of the digest; raise it whenever this code would make another world."""

BUILDS = {
    "original": ("forget", "retain", "other"),
    "retrained": ("retain", "other"),
}
"""Model -> the questions that it is trained on."""


class World(NamedTuple):
    """A small world.

    Attributes:
        model: the decoder; both params belong to it.
        params: of the original, which knows every answer. Do not donate them.
        retrained: params of the model that never saw the rows to forget.
        tokenizer: a transformers tokenizer.
        questions: {"forget": rows, "retain": rows}, rows as experiments.small.questions
            describes them; both models are trained on `other` rows, if there are any.
        digest: identifies the world.
        about: the content of world.json.
    """

    model: Model
    params: Params
    retrained: Params
    tokenizer: Any
    questions: Mapping[str, Sequence[questions.Row]]
    digest: str
    about: Mapping[str, Any]

    def table(self, kind: str) -> dict[str, Any]:
        """A table of the questions of a kind, such as "forget", and their answers."""
        rows, length = self.questions[kind], self.about["length"]
        return questions.encode(self.tokenizer, rows, length=length)


def defaults() -> ConfigDict:
    """Every setting of a world except its facts."""
    return ConfigDict(
        {
            "output": "runs/small",
            "seed": 0,
            "facts": {},  # as questions.read takes them
            "vocab": 4000,
            "model": dict(width=256, layers=5, heads=4, hidden=704),
            "steps": 420,
            "batch_size": 32,
            "learning_rate": 2e-3,
            "warmup": 20,
            "save_every": 100,
        }
    )


def make(config: ConfigDict, *, progress: bool = False) -> World:
    """The world of a config: loaded if it was made before, else made now.

    Raises:
        FileNotFoundError: where the facts are missing.
        ValueError: for a config that cannot be used.
        NotFinite: if training diverges.
    """
    _check(config)
    rows, tokenizer = questions.read(config.facts.to_dict(), config.vocab)
    plain = json.loads(json.dumps(config.to_dict()))
    name = digest(plain, rows)
    output = Path(config.output).expanduser()
    output.mkdir(parents=True, exist_ok=True)
    folder, making = output / name, output / f"{name}.making"
    with (output / f"{name}.lock").open("w", encoding="utf-8") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (folder / "world.json").exists():
            making.mkdir(exist_ok=True)
            _make(plain, rows, tokenizer, making, progress)
            os.replace(making, folder)
    return load(folder)


def load(folder: str | os.PathLike) -> World:
    """The world that `make` saved in `folder`."""
    folder = Path(folder)
    model, params, tokenizer = hf.load(folder / "original", remat="none")
    return World(
        model,
        params,
        hf.load(folder / "retrained", remat="none")[1],
        tokenizer,
        json.loads((folder / "questions.json").read_text(encoding="utf-8")),
        folder.name,
        json.loads((folder / "world.json").read_text(encoding="utf-8")),
    )


def digest(config: Mapping[str, Any], rows: Any) -> str:
    """Sixteen hexadecimal digits that identify the settings and questions."""
    used = {k: v for k, v in config.items() if k not in ("output", "save_every")}
    used["facts"] = {k: v for k, v in used["facts"].items() if k != "folder"}
    text = json.dumps([VERSION, used, rows], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _make(config, rows, tokenizer, making, progress):
    # Wrong answers are scored, so the length must fit them too.
    lines = [
        f"{row['question']} {answer}{questions.END}"
        for each in rows.values()
        for row in each
        for answer in questions.answers(row)
    ]
    longest = max(len(ids) for ids in tokenizer(lines)["input_ids"])
    length = table.rounded_length(longest)
    model = _model(config, len(tokenizer), 2 * length)  # room to generate in
    about = {"config": config, "length": length}
    about["questions"] = {kind: len(each) for kind, each in rows.items()}
    for name, kinds in BUILDS.items():
        note = making / f"{name}.json"
        if not note.exists():
            start = time.perf_counter()
            seen = [row for kind in kinds for row in rows.get(kind, ())]
            encoded = questions.encode(tokenizer, seen, length=length)
            seen = questions.count_documents(seen, encoded)
            saved = making / f"{name}.checkpoints"
            params, loss = _train(config, model, seen, saved, name, progress)
            hf.save(model, params, making / name, tokenizer=tokenizer)
            seconds = time.perf_counter() - start
            page.write_json(note, {"last_loss": loss, "seconds": seconds})
            shutil.rmtree(saved)
        about[name] = json.loads(note.read_text(encoding="utf-8"))
    count = sum(x.size for x in jax.tree.leaves(models.decoder.shapes(model.config)))
    about["parameters"] = count
    page.write_json(making / "questions.json", rows)
    page.write_json(making / "world.json", about)


def _train(config, model, seen, folder, name, progress):
    """(params, last loss) after all steps, resumed from the last checkpoint."""
    learning_rate = optax.warmup_cosine_decay_schedule(
        0.0,
        config["learning_rate"],
        config["warmup"],
        config["steps"],
        config["learning_rate"] / 10,
    )
    recipe = recipes.finetune.nll(model, learning_rate=learning_rate)
    key = jax.random.key(config["seed"])
    step, state, frozen = recipe.setup(model, model.init(key), key=key)
    saved = checkpoint.open(folder, keep=2)
    shapes = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state
    )
    found = checkpoint.restore(saved, shapes)
    state = found.state if found else state
    done = int(state.step)
    if progress:
        rows = len(seen["tokens"])
        _print(f"Training the {name} model on {rows} rows, from step {done}")
    stream = table.streams(
        {"train": seen}, config["batch_size"], seed=config["seed"], skip=done
    )
    hook = preempt.hook(saved, every=config["save_every"], steps=config["steps"])
    state, log = ju.fit(
        step,
        state,
        stream,
        frozen,
        steps=config["steps"],
        hooks=[hook],
        progress=progress,
    )
    checkpoint.close(saved)
    return state.params, log[-1]["total/loss"] if log else None


def _model(config, vocab, positions):
    c = config["model"]
    return models.make(
        models.DecoderConfig(
            family="llama",
            vocab=vocab,
            width=c["width"],
            layers=c["layers"],
            heads=c["heads"],
            kv_heads=c["heads"],
            head_dim=c["width"] // c["heads"],
            hidden=c["hidden"],
            positions=positions,
            tied=True,
            remat="none",
        )
    )


def _check(config: ConfigDict) -> None:
    for name in config:
        _checks.one_of("The small world's config", list(defaults()), key=name)
    for name in config.model:
        _checks.one_of("The small world's model", list(defaults().model), key=name)
    if not config.facts.get("source"):
        raise ValueError(
            "The small world's config needs facts.source, got none. Set it to one of "
            f"{_checks.listed(questions.SOURCES)}."
        )
    names = ("vocab", "steps", "batch_size", "save_every")
    _checks.positive_int("The small world's config", **{n: config[n] for n in names})
    _checks.positive_int("The small world's model", **config.model.to_dict())
    _checks.positive("The small world's config", learning_rate=config.learning_rate)
    if config.model.width % config.model.heads:
        raise ValueError(
            "The small world's model needs heads that divide its width, got "
            f"heads={config.model.heads} and width={config.model.width}."
        )
    if config.warmup >= config.steps:
        raise ValueError(
            "The small world's config needs warmup < steps, got "
            f"warmup={config.warmup} and steps={config.steps}."
        )


def _print(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def main(arguments: command.Arguments) -> None:
    """Makes the world that --config describes and prints what its models know."""
    from experiments.small import score

    small = make(arguments.config, progress=True)
    folder = Path(arguments.config.output).expanduser() / small.digest
    print(f"{folder}: {small.about['parameters'] / 1e6:.2f}M parameters")
    if not any("perturbed_answer" in row for row in small.questions["forget"]):
        return  # LUME's rows have no wrong answers; experiments/semeval scores them
    scorer = score.scorer(small)
    for name, params in (("original", small.params), ("retrained", small.retrained)):
        print(f"{name}: {score.in_words(score.summary(scorer, params))}")


if __name__ == "__main__":
    command.main(main, __doc__, config=CONFIG)
