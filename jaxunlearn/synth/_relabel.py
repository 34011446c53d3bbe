# SPDX-License-Identifier: Apache-2.0
"""Pseudo-labels, wrong labels, and the training set of the multi-GAN method.

    table, confidence = synth.pseudo_label(model, params, images)
    mixed = synth.build_mixture(
        forget=forget,
        retain=retain,
        drawn_forget=drawn_forget,
        drawn_retain=drawn_retain,
        num_classes=10,
        key=key,
    )
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
    """A table of images with the labels that a model predicts.

    Args:
        model, params: the classifier, run in inference mode.
        images: [n, H, W, C], in the format of the model.
        batch_size: images at a time.
    Returns:
        (table, confidence [n] float32, the probability of each label).
    Raises:
        ValueError: if images have another shape or are out of range. TypeError: if they
            have another dtype.
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
    num_classes: int,
    *,
    rule: str = "reflect",
    key: PRNGKey | None = None,
    logits: Array | None = None,
) -> np.ndarray:
    """A wrong label for each label, by a rule: "inverted" labels for several classes.

    | rule | new label of y, for C classes |
    | --- | --- |
    | reflect | C - 1 - y; for odd C the middle label becomes (y + 1) mod C |
    | shift | (y + 1) mod C |
    | random_wrong | uniform over the other labels; needs key |
    | least_likely | the other label with the smallest logit; needs logits |

    A distribution over all other labels is not a label but a loss: for this, use the
    rows as a separate stream with terms.on_tokens and `losses.complementary_ce`.

    Args:
        labels: [n] int in [0, C).
        num_classes: C >= 2.
        rule: see above.
        key: draws the labels of "random_wrong".
        logits: [n, C] of the original model, for "least_likely".
    Returns:
        [n] int32, different from the labels.
    Raises:
        ValueError: if the rule is unknown, a label is not in [0, C), or the rule needs
            an argument that is None. TypeError: if labels are not integers.
    Paper and code: the paper says "inverted" and gives no rule for several classes.
    """
    owner = "invert_labels"
    _checks.one_of(owner, RULES, rule=rule)
    labels = np.asarray(labels)
    _checks.integers(owner, labels=labels)
    if num_classes < 2 or (labels < 0).any() or (labels >= num_classes).any():
        raise ValueError(
            f"{owner} needs num_classes >= 2 and labels from 0 to num_classes - 1, got "
            f"num_classes={num_classes} and labels from {labels.min()} to "
            f"{labels.max()}."
        )
    if rule == "random_wrong":
        if key is None:
            raise ValueError(
                f"{owner} needs a key for rule='random_wrong', got key=None. Pass "
                "jax.random.key(0)."
            )
        more = np.asarray(jax.random.randint(key, labels.shape, 1, num_classes))
        return ((labels + more) % num_classes).astype(np.int32)
    if rule == "least_likely":
        if logits is None or np.shape(logits) != (*labels.shape, num_classes):
            raise ValueError(
                f"{owner} needs logits [n, {num_classes}] for rule='least_likely', got "
                f"{'none' if logits is None else np.shape(logits)}. Use those of the "
                "original model."
            )
        others = np.array(logits, np.float32)
        others[np.arange(len(labels)), labels] = np.inf
        return others.argmin(axis=1).astype(np.int32)
    new = (labels + 1) % num_classes
    if rule == "reflect":
        new = np.where(2 * labels == num_classes - 1, new, num_classes - 1 - labels)
    return new.astype(np.int32)


def build_mixture(
    *,
    forget: tables.Table,
    retain: tables.Table,
    drawn_forget: tables.Table | None = None,
    drawn_retain: tables.Table | None = None,
    num_classes: int,
    rule: str = "reflect",
    key: PRNGKey | None = None,
    logits: Mapping[str, Array] | None = None,
) -> tables.Table:
    """The training set of multi-GAN: correct labels for retain, wrong ones for forget.

    Args:
        forget: table of the images to forget.
        retain: table of the images to retain.
        drawn_forget: images of the forget set's generator, labelled by the original
            model (`pseudo_label`); None for none.
        drawn_retain: the same for the retain set.
        num_classes, rule, key: as for `invert_labels`, for real and generated forget
            images.
        logits: of the original model for the rule "least_likely", by source: "forget"
            and "forget drawn".
    Returns:
        A table of the rows of retain, drawn_retain, forget and drawn_forget. Images are
        float32 in [0, 1]; the column `source` [n] int32 is the index in SOURCES.
    Raises:
        ValueError: as `invert_labels`; if images are out of range or of two shapes.
            TypeError: if images have another dtype.
    """
    _pixels.check("build_mixture", retain)
    shape = retain["image"].shape[1:]
    rows = (retain, drawn_retain, forget, drawn_forget)
    keys = [None] * 4 if key is None else jax.random.split(key, 4)
    change = partial(invert_labels, num_classes=num_classes, rule=rule)
    found = []
    for source, (table, key) in enumerate(zip(rows, keys, strict=True)):
        if table is None:
            continue
        _pixels.check("build_mixture", table, shape)
        image = _pixels.as_float("build_mixture", np.asarray(table["image"]))
        tokens = np.array(table["tokens"])
        if source >= 2:
            source_logits = (logits or {}).get(SOURCES[source])
            tokens[:, 1] = change(tokens[:, 1], key=key, logits=source_logits)
        of = np.full(len(tokens), source, np.int32)
        mask = np.ones(tokens.shape, bool)
        found.append({"image": image, "tokens": tokens, "mask": mask, "source": of})
    return {name: np.concatenate([x[name] for x in found]) for name in found[0]}
