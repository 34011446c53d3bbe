# SPDX-License-Identifier: Apache-2.0
"""Labels by a model, labels turned round, and the set the multi-GAN method trains on.

    labels, confidence = synth.pseudo_label(model, params, drawn)
    mixed = synth.build_mixture(forget, retain, drawn_f, drawn_r, classes=10, key=key)
    recipe = recipes.finetune.nll(model, streams={"mixed": 1.0})

References: Hatua, Nguyen and Sung 2024, https://arxiv.org/abs/2407.18467
"""

from collections.abc import Mapping
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from jaxunlearn import _checks, _pixels
from jaxunlearn.data import table as tables
from jaxunlearn.typing import Array, Model, Params, PRNGKey

RULES = ("reflect", "shift", "random_wrong", "least_likely")
SOURCES = ("retain", "retain drawn", "forget", "forget drawn")


def pseudo_label(
    model: Model, params: Params, images: np.ndarray, *, batch_size: int = 256
) -> tuple[tables.Table, np.ndarray]:
    """A table of the images with the labels that the model gives them.

    Args:
        model, params: the classifier, run as it is used.
        images: [n, H, W, C], as it takes them.
    Returns:
        (table, confidence [n] float32: the probability of each label).
    Raises:
        ValueError: for images of another shape or out of range. TypeError: for another
            dtype.
    """
    _pixels.check("pseudo_label", {"image": images})

    @jax.jit
    def judge(params, image):
        hidden = model.apply(params, {"image": image}).hidden[:, 0]
        shares = jax.nn.softmax(model.unembed(params, hidden))
        return jnp.argmax(shares, axis=1), jnp.max(shares, axis=1)

    found = []
    for batch in tables.eval_batches({"image": images}, batch_size):
        each = judge(params, batch["image"])
        found.append([np.asarray(x)[batch["valid"]] for x in each])
    labels, confidence = map(np.concatenate, zip(*found, strict=True))
    tokens = np.stack([np.zeros_like(labels), labels], axis=1).astype(np.int32)
    mask = np.ones(tokens.shape, bool)
    return {"image": images, "tokens": tokens, "mask": mask}, confidence


def invert_labels(
    labels: Array,
    classes: int,
    *,
    rule: str = "reflect",
    key: PRNGKey | None = None,
    logits: Array | None = None,
) -> np.ndarray:
    """Another label for each: what "inverted" may mean for more than two classes.

    | rule | new label |
    | --- | --- |
    | reflect | C - 1 - y; the middle one of odd C becomes (y + 1) mod C |
    | shift | (y + 1) mod C |
    | random_wrong | any other, alike likely; needs key |
    | least_likely | of the others, what the model holds least likely; needs logits |

    Spread over all others at once, a label is no label but a loss: keep the rows apart
    as a stream of their own and give terms.on_tokens `losses.complementary_ce`.

    Args:
        labels: [n] int in [0, C).
        classes: C >= 2.
        key: for random_wrong.
        logits: [n, C] of the original model, for least_likely.
    Returns:
        [n] int32, nowhere the label itself.
    Raises:
        ValueError: for another rule, labels that are no class, or what a rule lacks.
            TypeError: for labels that are not whole.
    Paper and code: the paper says "inverted" without a rule for several classes.
    """
    owner = "invert_labels"
    _checks.one_of(owner, RULES, rule=rule)
    labels = np.asarray(labels)
    _checks.whole(owner, labels=labels)
    if classes < 2 or (labels < 0).any() or (labels >= classes).any():
        raise ValueError(
            f"{owner} needs two classes at least and labels from 0 to classes - 1, got "
            f"classes={classes} and labels {labels.min()} to {labels.max()}."
        )
    if rule == "random_wrong":
        if key is None:
            raise ValueError(f"{owner} needs key for rule='random_wrong', got none.")
        more = np.asarray(jax.random.randint(key, labels.shape, 1, classes))
        return ((labels + more) % classes).astype(np.int32)
    if rule == "least_likely":
        if logits is None or np.shape(logits) != (*labels.shape, classes):
            raise ValueError(
                f"{owner} needs logits [n, {classes}] for rule='least_likely', got "
                f"{'none' if logits is None else np.shape(logits)}."
            )
        others = np.array(logits, np.float32)
        others[np.arange(len(labels)), labels] = np.inf
        return others.argmin(axis=1).astype(np.int32)
    new = (labels + 1) % classes
    if rule == "reflect":
        new = np.where(2 * labels == classes - 1, new, classes - 1 - labels)
    return new.astype(np.int32)


def build_mixture(
    forget: tables.Table,
    retain: tables.Table,
    drawn_forget: tables.Table | None = None,
    drawn_retain: tables.Table | None = None,
    *,
    classes: int,
    rule: str = "reflect",
    key: PRNGKey | None = None,
    logits: Mapping[str, Array] | None = None,
) -> tables.Table:
    """One table: retained and drawn images as they are, forgotten ones mislabelled.

    Args:
        forget, retain: tables of images.
        drawn_forget, drawn_retain: drawn by generators and labelled by the original
            model (`pseudo_label`); None for none.
        classes, rule, key: of `invert_labels`, for both kinds of forgotten images.
        logits: those of the original model for `least_likely`, by source: "forget" and
            "forget drawn".
    Returns:
        The rows of retain, drawn_retain, forget and drawn_forget; images are float32 in
        [0, 1], and a column `source` [n] int32 says which of SOURCES a row is of.
    Raises:
        ValueError: as `invert_labels`; for images out of range or of two shapes.
            TypeError: for images of another dtype.
    """
    _pixels.check("build_mixture", retain)
    shape = retain["image"].shape[1:]
    rows = (retain, drawn_retain, forget, drawn_forget)
    keys = [None] * 4 if key is None else jax.random.split(key, 4)
    change = partial(invert_labels, classes=classes, rule=rule)
    found = []
    for source, (table, key) in enumerate(zip(rows, keys, strict=True)):
        if table is None:
            continue
        _pixels.check("build_mixture", table, shape)
        image = _pixels.as_float("build_mixture", np.asarray(table["image"]))
        tokens = np.array(table["tokens"])
        if source >= 2:
            held = (logits or {}).get(SOURCES[source])
            tokens[:, 1] = change(tokens[:, 1], key=key, logits=held)
        of = np.full(len(tokens), source, np.int32)
        mask = np.ones(tokens.shape, bool)
        found.append({"image": image, "tokens": tokens, "mask": mask, "source": of})
    return {name: np.concatenate([x[name] for x in found]) for name in found[0]}
