# SPDX-License-Identifier: Apache-2.0
"""Makes the small world, once: a model that knows every author, and its twin.

    python -m experiments.small.world --config=experiments/small/configs/tofu.py

The twin is trained from the same seed for as many steps on the rows to keep alone: what
the model should have become had it never seen the others. The world is kept in
`<output>/<digest>`, by a digest of the config, the questions and VERSION:

    model/, twin/     checkpoints as hf.load reads them, the tokenizer beside them
    questions.json    {"forget": rows, "retain": rows}
    world.json        the config, times and last losses

It appears there whole or not at all. A process that was cut off goes on from its last
checkpoint by the same command; two at a time wait for one another.
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
from absl import app, flags, logging
from ml_collections import ConfigDict, config_flags

import jaxunlearn as ju
from experiments.small import questions
from jaxunlearn import _checks, models, recipes
from jaxunlearn.data import table
from jaxunlearn.io import checkpoint, hf, preempt
from jaxunlearn.typing import Model, Params

VERSION = 1
"""Part of the digest; one more whenever this code would make another world."""

BUILDS = {"model": ("forget", "retain", "other"), "twin": ("retain", "other")}


class World(NamedTuple):
    """A world that was made.

    Attributes:
        model: the decoder; both params belong to it.
        params: knows every answer; read only, as is `twin`.
        twin: never saw the rows to forget.
        tokenizer: a transformers tokenizer.
        questions: {"forget": rows, "retain": rows}, rows as experiments.small.questions
            describes them; `other` rows, where there are any, both models know.
        digest: says which world it is.
        about: what world.json holds.
    """

    model: Model
    params: Params
    twin: Params
    tokenizer: Any
    questions: Mapping[str, Sequence[questions.Row]]
    digest: str
    about: Mapping[str, Any]

    def table(self, kind: str) -> dict[str, Any]:
        """Questions of a kind, such as "forget", with answers, to train on."""
        rows, length = self.questions[kind], self.about["length"]
        return questions.encode(self.tokenizer, rows, length=length)


def defaults() -> ConfigDict:
    """Every setting of a world but its facts."""
    return ConfigDict(
        {
            "output": "runs/small",
            "seed": 0,
            "facts": {},  # as questions.read takes them
            "vocab": 4000,
            "model": dict(width=256, layers=5, heads=4, hidden=704),
            "steps": 420,
            "rows": 32,  # a step
            "learning_rate": 2e-3,
            "warmup": 20,
            "save_every": 100,
        }
    )


def make(config: ConfigDict, *, progress: bool = False) -> World:
    """The world of a config, read where it was made before, or else made now.

    Raises:
        FileNotFoundError: where the facts are absent.
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
    with (output / f"{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (folder / "world.json").exists():
            making.mkdir(exist_ok=True)
            _make(plain, rows, tokenizer, making, progress)
            os.replace(making, folder)
    return load(folder)


def load(folder: str | os.PathLike) -> World:
    """The world in `folder`, which `make` left there."""
    folder = Path(folder)
    model, params, tokenizer = hf.load(folder / "model", remat="none")
    return World(
        model,
        params,
        hf.load(folder / "twin", remat="none")[1],
        tokenizer,
        json.loads((folder / "questions.json").read_text(encoding="utf-8")),
        folder.name,
        json.loads((folder / "world.json").read_text(encoding="utf-8")),
    )


def digest(config: Mapping[str, Any], rows: Any) -> str:
    """Sixteen letters that change with all that makes the world another one."""
    used = {k: v for k, v in config.items() if k not in ("output", "save_every")}
    used["facts"] = {k: v for k, v in used["facts"].items() if k != "folder"}
    text = json.dumps([VERSION, used, rows], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _make(config, rows, tokenizer, making, progress):
    # Room for the wrong answers too: those are scored.
    lines = [
        f"{row['question']} {answer}{questions.END}"
        for each in rows.values()
        for row in each
        for answer in questions.answers(row)
    ]
    longest = max(len(ids) for ids in tokenizer(lines)["input_ids"])
    length = -(-longest // table.ROUND_TO) * table.ROUND_TO
    model = _model(config, len(tokenizer), 2 * length)  # room to generate in
    about = {"config": config, "length": length}
    about["questions"] = {kind: len(each) for kind, each in rows.items()}
    for name, kinds in BUILDS.items():
        note = making / f"{name}.json"
        if not note.exists():
            start = time.perf_counter()
            seen = [row for kind in kinds for row in rows.get(kind, ())]
            seen = questions.whole(
                seen, questions.encode(tokenizer, seen, length=length)
            )
            saved = making / f"{name}.checkpoints"
            params, loss = _train(config, model, seen, saved, name, progress)
            hf.save(params, model, making / name, tokenizer=tokenizer)
            seconds = time.perf_counter() - start
            _write(note, {"last_loss": loss, "seconds": seconds})
            shutil.rmtree(saved)
        about[name] = json.loads(note.read_text())
    count = sum(x.size for x in jax.tree.leaves(models.decoder.shapes(model.config)))
    about["parameters"] = count
    _write(making / "questions.json", rows)
    _write(making / "world.json", about)


def _train(config, model, seen, folder, name, progress):
    """(params, last loss) after all steps, from the last checkpoint on."""
    learning_rate = optax.warmup_cosine_decay_schedule(
        0.0,
        config["learning_rate"],
        config["warmup"],
        config["steps"],
        config["learning_rate"] / 10,
    )
    recipe = recipes.finetune.nll(model, learning_rate=learning_rate)
    key = jax.random.key(config["seed"])
    state = ju.init_state(model.init(key), recipe.tx, key)
    saved = checkpoint.open(folder, keep=2)
    shapes = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state
    )
    found = checkpoint.restore(saved, shapes)
    state = found.state if found else state
    done = int(state.step)
    if progress:
        _say(f"Training the {name} on {len(seen['tokens'])} rows, from step {done}")
    stream = table.streams(
        {"train": seen}, config["rows"], seed=config["seed"], skip=done
    )
    hook = preempt.hook(saved, every=config["save_every"], steps=config["steps"])
    state, log = ju.fit(
        jax.jit(ju.make_step(recipe.terms, recipe.tx), donate_argnums=0),
        state,
        stream,
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
    known = list(defaults())
    for name in config:
        _checks.one_of("The small world's config", known, key=name)
    for name in config.model:
        _checks.one_of("The small world's model", list(defaults().model), key=name)
    if not config.facts.get("source"):
        raise ValueError(
            "The small world's config needs facts.source, got none. Set it to one of "
            f"{_checks.listed(questions.SOURCES)}."
        )
    names = ("vocab", "steps", "rows", "save_every")
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


def _write(path: Path, content: Any) -> None:
    fresh = path.with_name(path.name + ".new")
    fresh.write_text(json.dumps(content, ensure_ascii=False) + "\n", encoding="utf-8")
    os.replace(fresh, path)


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def main(argv: list[str]) -> None:
    """Makes the world that --config describes and says what is in it."""
    del argv
    from experiments.small import score

    try:
        made = make(flags.FLAGS.config, progress=True)
    except (OSError, ValueError, TypeError, KeyError, ju.NotFinite) as error:
        _say(f"error: {error}")
        raise SystemExit(2) from error
    where = Path(flags.FLAGS.config.output).expanduser() / made.digest
    print(f"{where}: {made.about['parameters'] / 1e6:.2f}M parameters")
    if not any("perturbed_answer" in row for row in made.questions["forget"]):
        return  # LUME's rows have no wrong answers; experiments/semeval/run.py asks them
    judge = score.judge(made)
    for name, params in (("model", made.params), ("twin", made.twin)):
        print(f"{name}: {score.in_words(score.summary(judge, params))}")


if __name__ == "__main__":
    config_flags.DEFINE_config_file("config", help_string="a file of configs/small")
    logging.set_verbosity(logging.WARNING)
    app.run(main)
