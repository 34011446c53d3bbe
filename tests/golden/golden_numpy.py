# SPDX-License-Identifier: Apache-2.0
"""Random golden cases with answers in plain NumPy; gradients are derived by hand.

It shares no line with jaxunlearn, so a shape, a seed or a hyperparameter that got fixed
in the runner shows up as a difference.
"""

import numpy as np


def make(name, seed, cases=None):
    """(case, inputs, outputs) of a family at a random size with random settings."""
    rng = np.random.default_rng([seed, *name.encode()])
    hyperparameters, inputs, outputs, *more = (cases or CASES)[name](rng)
    case = {
        **(more[0] if more else {}),
        "name": name,
        "peer": "NumPy, this file",
        "hyperparameters": hyperparameters,
        "outputs": {role: f"{name}.out.{role}" for role in outputs},
    }
    return case, inputs, outputs


def _part(rng, part, vocab, ref=False):
    rows, length = rng.integers(2, 6), rng.integers(5, 14)
    labels = np.full((rows, length), -100)
    ids = np.zeros((rows, length), np.int64)
    for row in range(rows):
        end = rng.integers(3, length + 1)
        ids[row, :end] = rng.integers(1, vocab, end)
        start = rng.integers(0, end - 1)
        labels[row, start:end] = ids[row, start:end]
    arrays = {
        f"{part}_input_ids": ids,
        f"{part}_attention_mask": (ids > 0).astype(np.int64),
        f"{part}_labels": labels,
        f"{part}_logits": 2 * rng.normal(size=(rows, length, vocab)),
    }
    if ref:
        arrays[f"ref_{part}_logits"] = 2 * rng.normal(size=(rows, length, vocab))
    return arrays


def _log_softmax(z):
    z = z - z.max(-1, keepdims=True)
    return z - np.log(np.exp(z).sum(-1, keepdims=True))


def _answers(logits, labels):
    """Per row: summed log-probability, its gradient [B, T, V], and tokens summed."""
    logp = _log_softmax(logits)
    sums, grad = np.zeros(len(logits)), np.zeros_like(logits)
    for b, t in np.argwhere(labels[:, 1:] != -100):
        label = labels[b, t + 1]
        sums[b] += logp[b, t, label]
        grad[b, t] -= np.exp(logp[b, t])
        grad[b, t, label] += 1
    return sums, grad, (labels[:, 1:] != -100).sum(-1)


def _sigmoid(x):
    return 1 / (1 + np.exp(-x))


def _nll(x, part):
    sums, grad, counts = _answers(x[f"{part}_logits"], x[f"{part}_labels"])
    return -sums.sum() / counts.sum(), -grad / counts.sum()


def _kl(x, part):
    z, ref = x[f"{part}_logits"], x[f"ref_{part}_logits"]
    logp, logq = _log_softmax(z), _log_softmax(ref)
    positions = z.shape[0] * z.shape[1]
    value = (np.exp(logq) * (logq - logp)).sum() / positions
    return value, (np.exp(logp) - np.exp(logq)) / positions


def _mixed(given, forget, forget_grad, x):
    retain, retain_grad = (_nll if given["retain_loss_type"] == "NLL" else _kl)(
        x, "retain"
    )
    return {
        "loss": given["gamma"] * forget + given["alpha"] * retain,
        "grad_forget_logits": given["gamma"] * forget_grad,
        "grad_retain_logits": given["alpha"] * retain_grad,
    }


def _weights(rng):
    return {"gamma": rng.uniform(0.2, 2), "alpha": rng.uniform(0.2, 2)}


def _parts(rng):
    vocab = rng.integers(7, 40)
    return {**_part(rng, "forget", vocab, True), **_part(rng, "retain", vocab, True)}


def kl_retain(rng):
    x = _part(rng, "retain", rng.integers(7, 40), ref=True)
    loss, grad = _kl(x, "retain")
    return {}, x, {"loss": loss, "grad_retain_logits": grad}


def grad_diff(kind):
    def build(rng):
        x, given = _parts(rng), {**_weights(rng), "retain_loss_type": kind}
        nll, grad = _nll(x, "forget")
        return given, x, _mixed(given, -nll, -grad, x)

    return build


def npo(kind):
    def build(rng):
        x, beta = _parts(rng), rng.uniform(0.05, 2)
        given = {**_weights(rng), "beta": beta, "retain_loss_type": kind}
        sums, grad, _ = _answers(x["forget_logits"], x["forget_labels"])
        ref, _, _ = _answers(x["ref_forget_logits"], x["forget_labels"])
        rows = len(sums)
        value = np.mean(2 / beta * np.log1p(np.exp(beta * (sums - ref))))
        slope = 2 * _sigmoid(beta * (sums - ref)) / rows
        return given, x, _mixed(given, value, slope[:, None, None] * grad, x)

    return build


def simnpo(rng):
    x, beta, delta = _parts(rng), rng.uniform(0.5, 5), rng.uniform(-0.5, 1)
    given = {**_weights(rng), "beta": beta, "delta": delta, "retain_loss_type": "NLL"}
    sums, grad, _ = _answers(x["forget_logits"], x["forget_labels"])
    lengths = (x["forget_labels"] != -100).sum(-1)
    gap = beta * (sums / lengths + delta)
    value = np.mean(2 / beta * np.log1p(np.exp(gap)))
    slope = 2 * _sigmoid(gap) / lengths / len(sums)
    return given, x, _mixed(given, value, slope[:, None, None] * grad, x)


def muse_npo_klr(rng):
    x, beta = _parts(rng), rng.uniform(0.05, 2)
    z, ref = x["forget_logits"], x["ref_forget_logits"]
    forget = 2 / beta * np.mean(np.log1p(np.exp(beta * (z - ref))))
    r, q = x["retain_logits"], x["ref_retain_logits"]
    retain = (np.exp(q) * (q - r)).sum() / len(r)
    return (
        {"loss_type": "npo_klr", "beta": beta},
        x,
        {
            "loss": forget + retain,
            "grad_forget_logits": 2 * _sigmoid(beta * (z - ref)) / z.size,
            "grad_retain_logits": -np.exp(q) / len(r),
        },
    )


def _gradients(rng):
    shapes = [tuple(rng.integers(1, 6, rng.integers(1, 4))) for _ in range(5)]
    x = {}
    for level in ("forget", "retain"):
        for i, shape in enumerate(shapes):
            x[f"{level}_grad_{i}"] = rng.normal(size=shape)
    flat = [
        np.concatenate([x[f"{level}_grad_{i}"].ravel() for i in range(len(shapes))])
        for level in ("forget", "retain")
    ]
    return shapes, x, *flat


def _directions(shapes, u):
    ends = np.cumsum([np.prod(shape) for shape in shapes])[:-1]
    pieces = np.split(u, ends)
    return {
        f"direction_{i}": piece.reshape(shape)
        for i, (piece, shape) in enumerate(zip(pieces, shapes, strict=True))
    }


def blur(mode):
    def build(rng):
        shapes, x, f, r = _gradients(rng)
        gamma = rng.uniform(0.01, 3)
        u = {
            "BLO_forget_lower": r + (gamma - r @ f / (f @ f)) * f,
            "BLO_forget_upper": f + (gamma - r @ f / (r @ r)) * r,
            "Pen": f + gamma * r,
        }[mode]
        products = {"norm_R_sq": r @ r, "norm_F_sq": f @ f, "inner_F_R": f @ r}
        return {"mode": mode, "gama": gamma}, x, {**_directions(shapes, u), **products}

    return build


def blur_tofu(lower):
    def build(rng):
        shapes, x, f, r = _gradients(rng)
        gamma = rng.uniform(0.01, 3)
        low, high = (f, r) if lower else (r, f)
        u = high + (gamma - high @ low / (low @ low)) * low
        return {"lower": lower, "gamma": gamma}, x, _directions(shapes, u)

    return build


def blur_wmdp(rng):
    shapes, x, f, r = _gradients(rng)
    alpha = rng.uniform(0.5, 1000)
    return (
        {"alpha": alpha},
        x,
        _directions(shapes, f + alpha * (r - r @ f / (f @ f) * f)),
    )


CASES = {
    "kl_retain": kl_retain,
    "grad_diff_nll": grad_diff("NLL"),
    "grad_diff_kl": grad_diff("KL"),
    "npo_nll": npo("NLL"),
    "npo_kl": npo("KL"),
    "simnpo": simnpo,
    "muse_npo_klr": muse_npo_klr,
    "blur_muse_BLO_forget_lower": blur("BLO_forget_lower"),
    "blur_muse_BLO_forget_upper": blur("BLO_forget_upper"),
    "blur_muse_Pen": blur("Pen"),
    "blur_tofu_lower": blur_tofu(True),
    "blur_tofu_upper": blur_tofu(False),
    "blur_wmdp": blur_wmdp,
}
