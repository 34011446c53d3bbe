# SPDX-License-Identifier: Apache-2.0
"""How well a model forgot: accuracies, membership attacks M1 to M6, gradient metrics.

| attack | score of a row | attacker | number |
| --- | --- | --- | --- |
| m1 | loss | logistic regression, forget against new | accuracy; chance is 0.5 |
| m2 | entropy | logistic regression, retain against new | forget called members |
| m3 | entropy | support vectors (RBF, C = 3), the same | forget called members |
| m4 | loss | threshold calibrated on retain against new | balanced accuracy |
| m5 | loss | perceptron, all trained rows against all new | AUC |
| m6 | label only | share of noisy copies that are right, as m4 | balanced accuracy |

The reference of every attack is a retrained model: it never saw the forget set, so its
numbers are what perfect forgetting gives. New rows are test images. If a class is
forgotten, those of the other classes calibrate and those of the forgotten class test.
If images at random are forgotten, one half calibrates and the other half tests. M6
replaces a search for the decision boundary, which takes hundreds of queries an image.
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

NUM_COPIES, NOISE = 4, 0.1  # of an image in M6; standard deviation of pixels
MAX_ROWS = 250  # of each set that an attack uses
OM_ROWS, UM_ROWS = 12, 32  # rows of the gradient metrics
SETS = ("retain", "calibration", "forget", "new")


def evaluate(
    world: worlds.World, params: Params, split: images.Split, *, seed: int
) -> dict[str, Any]:
    """All measures of one model; accuracies and rates are fractions."""
    labels = np.unique(images.labels_of(split.retain))
    remaining = np.isin(images.labels_of(world.test), labels)
    class_forgotten = not remaining.all()
    order = np.random.default_rng(seed).permutation(len(remaining))
    new = ~remaining if class_forgotten else order < len(order) // 2
    masks = {"test": remaining, "calibration": ~new, "new": new}
    sets = {"retain": split.retain, "forget": split.forget} | {
        name: table.select(world.test, np.flatnonzero(rows))
        for name, rows in masks.items()
    }
    found = {name: scores(world, params, rows) for name, rows in sets.items()}
    names = ("retain", "forget", "test")
    result = {name: float(found[name]["right"].mean()) for name in names}
    result |= membership(found, seed=seed)
    result |= _label_only(world, params, sets, seed)
    if not class_forgotten:
        result["um"] = unlearning_metric(world, params, split)
    count = min(OM_ROWS, table.num_rows(split.forget))
    rows = table.select(split.forget, np.arange(count))
    result["om"] = float(overfitting(world, params, rows).mean())
    return result


def membership(found: Mapping[str, Mapping[str, np.ndarray]], *, seed: int) -> dict:
    """M1 to M5, of {"retain", "forget", "calibration", "new"}, each of {"loss": [n],
    "entropy": [n]}."""
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.neural_network import MLPClassifier
    from sklearn.svm import SVC

    rng = np.random.default_rng(seed)
    names = ("retain", "forget", "calibration", "new")
    loss, entropy = (
        {name: _sample(rng, found[name][score]) for name in names}
        for score in ("loss", "entropy")
    )
    threshold = metrics.attack_threshold(**_attacker_sets(loss))
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
    probability = net.predict_proba(x[~fit])[:, 1]
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
        "m4": threshold.balanced_accuracy,
        "m4_auc": threshold.auc,
        "m4_tpr": threshold.tpr,
        "m5": metrics.auc(-probability[member[~fit]], -probability[~member[~fit]]),
    }


def _attacker_sets(values):
    """The arguments of `metrics.attack_threshold`; new rows are tested."""
    names = ("retain", "calibration", "forget")
    return {name: values[name] for name in names} | {"others": values["new"]}


def _sample(rng: np.random.Generator, values: np.ndarray) -> np.ndarray:
    """At most MAX_ROWS of them, shuffled."""
    return values[rng.permutation(len(values))[:MAX_ROWS]]


def scores(
    world: worlds.World, params: Params, rows: table.Table
) -> dict[str, np.ndarray]:
    """[n] `loss` and `entropy` in nats, and `right`: the label has the top score."""
    logits = jnp.asarray(worlds.logits(world.model, params, rows))
    labels = jnp.asarray(images.labels_of(rows))
    flat = losses.kl_uniform(logits, direction="reverse")  # ln C minus the entropy
    return {
        "loss": -np.asarray(losses.token_logps(logits, labels)),
        "entropy": np.log(logits.shape[1]) - np.asarray(flat),
        "right": np.asarray(metrics.choice_accuracy(logits, labels)),
    }


def _label_only(world, params, sets, seed) -> dict[str, float]:
    """M6: a threshold on the share of noisy copies that are classified wrongly."""
    rng = np.random.default_rng(seed)
    wrong = {}
    for name in SETS:
        order = rng.permutation(table.num_rows(sets[name]))
        rows = table.select(sets[name], order[:MAX_ROWS])
        labels, pixels = images.labels_of(rows), images.as_float(rows)["image"]
        noisy = [
            np.clip(pixels + NOISE * rng.standard_normal(pixels.shape), 0, 1)
            for _ in range(NUM_COPIES)
        ]
        guesses = [
            worlds.logits(world.model, params, {"image": x.astype(np.float32)})
            for x in noisy
        ]
        wrong[name] = np.mean([g.argmax(1) != labels for g in guesses], axis=0)
    threshold = metrics.attack_threshold(**_attacker_sets(wrong))
    return {"m6": threshold.balanced_accuracy}


def unlearning_metric(world: worlds.World, params: Params, split) -> float:
    """UM, the mean over the classes that are both forgotten and retained, percent."""
    found = []
    for label in np.unique(images.labels_of(split.forget)):
        grads = {}
        for name in ("forget", "retain"):
            part = getattr(split, name)
            rows = np.flatnonzero(images.labels_of(part) == label)[:UM_ROWS]
            # One shape for all: the rows of a small class are repeated.
            batch = table.select(part, np.resize(rows, UM_ROWS))
            grads[name] = _value_and_gradient(params, batch, world.model)[1]
        found.append(float(metrics.unlearning_metric(**grads)))
    return float(np.mean(found))


def overfitting(world: worlds.World, params: Params, rows: table.Table) -> np.ndarray:
    """[n] the overfitting metric (OM) of every row, in evaluation mode."""
    found = []
    for row in range(table.num_rows(rows)):
        one = table.select(rows, np.array([row]))
        found.append(_overfitting(params, one, world.model))
    return np.array(found)


@partial(jax.jit, static_argnums=2)
def _overfitting(params, one, model):
    loss, grads = _value_and_gradient(params, one, model)
    return metrics.overfitting_metric(loss, trees.split(grads, vision.TRAINABLE)[0])


def _mean_loss(params, rows, model):
    scores = model.unembed(params, vision.features(model, params, rows))
    return jnp.mean(losses.nll(losses.token_logps(scores, rows["tokens"][:, 1])))


_value_and_gradient = jax.jit(jax.value_and_grad(_mean_loss), static_argnums=2)
