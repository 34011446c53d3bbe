# SPDX-License-Identifier: Apache-2.0
"""How well a model forgot: accuracies, membership attacks M1 to M6, gradient metrics.

| attack | score of a row | attacker | number |
| --- | --- | --- | --- |
| m1 | loss | logistic regression, forgotten against new | accuracy; 0.5 is a guess |
| m2 | entropy | logistic regression, retained against new | forgotten called members |
| m3 | entropy | RBF support vectors (C = 3), the same | forgotten called members |
| m4 | loss | threshold calibrated on retained against new | balanced accuracy |
| m5 | loss | perceptron, all trained rows against all new | AUC |
| m6 | label only | share of noisy copies judged right; threshold as m4 | the same |

All have a retrained model as the reference: it never saw the rows to forget, so what it
gives is what forgetting would give. Rows never seen are test images: those of classes
that stay calibrate, those of the forgotten class judge; where images at random are
forgotten one half calibrates and the other judges. M6 stands for a search for the
decision boundary, which takes hundreds of queries an image.
"""

import warnings
from collections.abc import Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.vision import world as worlds
from jaxunlearn import losses, metrics, trees
from jaxunlearn.data import images, table
from jaxunlearn.models import vision
from jaxunlearn.typing import Params

COPIES, NOISE, MOST, OM_ROWS = 4, 0.1, 250, 12


def judge(
    world: worlds.World, params: Params, split: images.Split, *, seed: int
) -> dict[str, Any]:
    """All measures of one model; accuracies and rates are fractions."""
    kept = np.unique(images.labels_of(split.retain))
    stays = np.isin(images.labels_of(world.test), kept)
    whole_class = not stays.all()
    order = np.random.default_rng(seed).permutation(len(stays))
    judged = ~stays if whole_class else order < len(order) // 2
    sets = {"retain": split.retain, "forget": split.forget} | {
        name: table.select(world.test, np.flatnonzero(rows))
        for name, rows in dict(test=stays, calibration=~judged, new=judged).items()
    }
    found = {name: scores(world, params, rows) for name, rows in sets.items()}
    names = ("retain", "forget", "test")
    result = {name: float(found[name]["right"].mean()) for name in names}
    result |= attacks(found, seed=seed)
    result |= _label_only(world, params, sets, seed)
    if not whole_class:
        result["um"] = unlearning_metric(world, params, split)
    some = min(OM_ROWS, table.num_rows(split.forget))
    some = table.select(split.forget, np.arange(some))
    result["om"] = float(overfitting(world, params, some).mean())
    return result


def attacks(found: Mapping[str, Mapping[str, np.ndarray]], *, seed: int) -> dict:
    """M1 to M5, of {"retain", "forget", "calibration", "new"}, each of {"loss": [n],
    "entropy": [n]}."""
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.neural_network import MLPClassifier
    from sklearn.svm import SVC

    rng = np.random.default_rng(seed)
    names = ("retain", "forget", "calibration", "new")
    loss, entropy = (
        {name: _some(rng, found[name][kind]) for name in names}
        for kind in ("loss", "entropy")
    )
    told = metrics.attack_threshold(**_attacker_sets(loss))
    x = np.concatenate([entropy["retain"], entropy["calibration"]])[:, None]
    y = np.arange(len(x)) < len(entropy["retain"])
    vectors = SVC(C=3.0, gamma="auto", class_weight="balanced").fit(x, y)
    x = np.concatenate([found[name]["loss"] for name in names])[:, None]
    trained = len(found["retain"]["loss"]) + len(found["forget"]["loss"])
    member, fit = np.arange(len(x)) < trained, rng.random(len(x)) < 0.5
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        net = MLPClassifier((16,), max_iter=60, random_state=seed).fit(
            x[fit], member[fit]
        )
    chance = net.predict_proba(x[~fit])[:, 1]
    return {
        "m1": metrics.attack_accuracy(
            loss["forget"], loss["new"], key=jax.random.key(seed)
        ),
        "m2": metrics.attack_members(
            retain=entropy["retain"],
            others=entropy["calibration"],
            forget=entropy["forget"],
        ),
        "m3": float(vectors.predict(entropy["forget"][:, None]).mean()),
        "m4": told.balanced_accuracy,
        "m4_auc": told.auc,
        "m4_tpr": told.tpr,
        "m5": metrics.auc(-chance[member[~fit]], -chance[~member[~fit]]),
    }


def _attacker_sets(values):
    """The arguments of `metrics.attack_threshold`; the judged others are new rows."""
    names = ("retain", "calibration", "forget")
    return {name: values[name] for name in names} | {"others": values["new"]}


def _some(rng, values: np.ndarray) -> np.ndarray:
    """At most MOST of them, shuffled."""
    return values[rng.permutation(len(values))[:MOST]]


def scores(
    world: worlds.World, params: Params, rows: table.Table
) -> dict[str, np.ndarray]:
    """[n] `loss` and `entropy` in nats, and whether the label is the likeliest."""
    logits = jnp.asarray(worlds.logits(world.model, params, rows))
    labels = jnp.asarray(images.labels_of(rows))
    flat = losses.kl_uniform(logits, direction="reverse")  # ln C minus the entropy
    return {
        "loss": -np.asarray(losses.token_logps(logits, labels)),
        "entropy": np.log(logits.shape[1]) - np.asarray(flat),
        "right": np.asarray(metrics.choice_accuracy(logits, labels)),
    }


def _label_only(world, params, sets, seed) -> dict[str, float]:
    """M6: a threshold on how many noisy copies of an image are judged wrong."""
    rng = np.random.default_rng(seed)
    wrong = {}
    order = ("retain", "calibration", "forget", "new")
    for name in order:
        rows = table.select(
            sets[name], rng.permutation(table.num_rows(sets[name]))[:MOST]
        )
        labels, pixels = images.labels_of(rows), images.as_float(rows)["image"]
        noisy = [
            np.clip(pixels + NOISE * rng.standard_normal(pixels.shape), 0, 1)
            for _ in range(COPIES)
        ]
        guesses = [
            worlds.logits(world.model, params, {"image": x.astype(np.float32)})
            for x in noisy
        ]
        wrong[name] = np.mean([g.argmax(1) != labels for g in guesses], axis=0)
    told = metrics.attack_threshold(**_attacker_sets(wrong))
    return {"m6": told.balanced_accuracy}


def unlearning_metric(world, params, split, rows: int = 32) -> float:
    """UM, the mean over the classes that are both forgotten and retained, percent."""
    found = []
    for label in np.unique(images.labels_of(split.forget)):
        pair = {}
        for name in ("forget", "retain"):
            part = getattr(split, name)
            own = np.flatnonzero(images.labels_of(part) == label)[:rows]
            # One shape for all: the rows of a small class are repeated.
            rows_of_label = table.select(part, np.resize(own, rows))
            pair[name] = _gradient(params, rows_of_label, world)
        found.append(float(metrics.unlearning_metric(**pair)))
    return float(np.mean(found))


def overfitting(world: worlds.World, params: Params, rows: table.Table) -> np.ndarray:
    """[n] the overfitting metric (OM) of every row, in the model's own mode."""
    found = []
    for row in range(table.num_rows(rows)):
        one = table.select(rows, np.array([row]))
        found.append(_overfitting(params, one, world.model))
    return np.array(found)


@partial(jax.jit, static_argnums=2)
def _overfitting(params, one, model):
    loss, grads = _value_and_gradient(params, one, model)
    return metrics.overfitting_metric(loss, trees.split(grads, vision.TRAINABLE)[0])


def _gradient(params, rows, world):
    return _value_and_gradient(params, rows, world.model)[1]


def _mean_loss(params, rows, model):
    scores = model.unembed(params, vision.features(model, params, rows))
    return jnp.mean(losses.nll(losses.token_logps(scores, rows["tokens"][:, 1])))


_value_and_gradient = jax.jit(jax.value_and_grad(_mean_loss), static_argnums=2)
