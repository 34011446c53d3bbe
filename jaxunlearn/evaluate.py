# SPDX-License-Identifier: Apache-2.0
"""Running a model over tables: log-probabilities, perplexity, choices and completions.

Each function compiles once for a model and a batch shape, fills the last batch up and
drops what was filled in.
"""

import math
from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from jaxunlearn import _checks, losses, metrics, sharding, terms
from jaxunlearn._generate import generate, ready, rows_axis
from jaxunlearn.data import table as tables
from jaxunlearn.typing import Model, Params


def answer_logps(
    model: Model,
    params: Params,
    table: tables.Table | tables.Source,
    *,
    batch_size: int = 16,
    mesh: Mesh | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Log-probability of every row's answer.

    Args:
        model: the model.
        params: its parameters.
        table: `tokens`, `mask` and optionally `answer`, each [n, L], or a source of
            such rows.
        batch_size: rows at a time; data * fsdp of the mesh must divide it.
        mesh: where the params lie, if they do on one. With several processes all of
            them call this with the whole table, read and run their shares of the rows
            and get the values of all.
    Returns:
        (logps [n] float32, nats, summed over the answer; lengths [n] int32, its
        tokens).
    """
    share = (0, 1) if mesh is None else (jax.process_index(), jax.process_count())
    logps, lengths = [], []
    for batch in tables.eval_batches(table, batch_size, share=share):
        valid = batch["valid"]
        each, where = _on_mesh(_target_logps, model, params, _inputs(batch), mesh)
        logps.append(np.asarray(each).sum(axis=1)[valid])
        lengths.append(np.asarray(where).sum(axis=1)[valid])
    return np.concatenate(logps), np.concatenate(lengths).astype(np.int32)


class TokenScores(NamedTuple):
    """What teacher forcing says of every answer token; read by `metrics`.

    Attributes:
        logps: [n, L - 1] float32, log-probability of the token, nats.
        hits: [n, L - 1] bool, whether it is the likeliest one.
        standardised: [n, L - 1] float32, its log-probability in standard deviations
            from the mean of all tokens', as Min-K%++ sorts them.
        where: [n, L - 1] bool, True where the token belongs to the answer; elsewhere
            the others are 0 and False. Column t is of token t + 1.
    """

    logps: np.ndarray
    hits: np.ndarray
    standardised: np.ndarray
    where: np.ndarray


def token_scores(
    model: Model,
    params: Params,
    table: tables.Table | tables.Source,
    *,
    batch_size: int = 16,
    mesh: Mesh | None = None,
) -> TokenScores:
    """One forward pass over every row, for all metrics that teacher forcing gives.

        scores = evaluate.token_scores(model, params, table)
        metrics.probability(scores.logps, where=scores.where)           # [n]
        metrics.extraction_strength(scores.hits, where=scores.where)
        metrics.mia_min_k(scores.logps, where=scores.where)
        metrics.mia_min_k(scores.standardised, where=scores.where)      # Min-K%++

    Args, Raises: as `answer_logps`. No array of [B, L, V] exists on the way.
    """
    share = (0, 1) if mesh is None else (jax.process_index(), jax.process_count())
    found = []
    for batch in tables.eval_batches(table, batch_size, share=share):
        valid = batch["valid"]
        each = _on_mesh(_token_scores, model, params, _inputs(batch), mesh)
        found.append([np.asarray(x)[valid] for x in each])
    return TokenScores(*map(np.concatenate, zip(*found, strict=True)))


def reference_logps(
    model: Model,
    params: Params,
    table: tables.Table | tables.Source,
    *,
    batch_size: int = 16,
    mesh: Mesh | None = None,
) -> tables.Table | tables.Source:
    """The table with a column `ref_logps` [n] float32: the reference's answer_logps.

    Run it once, with the weights before unlearning; the reference model is not needed
    again.
    """
    logps, _ = answer_logps(model, params, table, batch_size=batch_size, mesh=mesh)
    return tables.with_columns(table, {"ref_logps": logps.astype(np.float32)})


def perplexity(
    model: Model, params: Params, table: tables.Table, *, batch_size: int = 16
) -> float:
    """exp(mean negative log-probability of an answer token); over all tokens, not
    rows."""
    logps, lengths = answer_logps(model, params, table, batch_size=batch_size)
    if not lengths.sum():
        raise ValueError("perplexity needs at least one answer token, got none.")
    nll = -float(logps.sum(dtype=np.float64)) / int(lengths.sum())
    return math.exp(nll) if nll < 700 else math.inf


def completions(
    model: Model,
    params: Params,
    tokenizer: Any,
    prompts: Sequence[str],
    *,
    max_new_tokens: int = 8,
    batch_size: int = 32,
    mesh: Mesh | None = None,
) -> list[str]:
    """Greedy continuation of every prompt, as text without the prompt.

    Prompts are sorted by length before they are batched, so that little is spent on
    padding; the answers come back in the order of the prompts.

    Args:
        model: a model with a cache.
        params: its parameters.
        tokenizer: a fast tokenizer.
        prompts: n texts.
        max_new_tokens: of each answer, at most.
        batch_size: prompts at a time; data * fsdp of the mesh must divide it.
        mesh: where the params lie, if they do on one; rows and caches are cut over it.
    Raises:
        ValueError: as `generate`, or for a mesh of several processes.
    """
    _checks.positive_int("completions", batch_size=batch_size)
    if mesh is not None and jax.process_count() > 1:
        raise ValueError(
            f"completions needs a mesh of one process, got {jax.process_count()}. Save "
            "the params and generate on one."
        )
    if not prompts:
        return []
    table = tables.encode(tokenizer, prompts)
    lengths = table["mask"].sum(axis=1)
    order = np.argsort(lengths, kind="stable")
    room = getattr(model.config, "longest", table["tokens"].shape[1]) - max_new_tokens
    texts = [""] * len(prompts)
    params = ready(model, params)
    settings = dict(max_new_tokens=max_new_tokens, end=tokenizer.eos_token_id)
    for start in range(0, len(order), batch_size):
        index = order[start : start + batch_size]
        full = np.resize(index, batch_size)  # the last batch repeats its first rows
        width = max(lengths[index].max(), min(_rounded(lengths[index].max()), room))
        batch = {name: table[name][full, :width] for name in ("tokens", "mask")}
        if mesh is None:
            new = generate(model, params, batch, **settings)
        else:
            with jax.set_mesh(mesh):
                rows = sharding.put_rows(batch, mesh)
                new = generate(model, params, rows, **settings)
        decoded = tokenizer.batch_decode(np.asarray(new), skip_special_tokens=True)
        for row, text in zip(index, decoded, strict=False):
            texts[row] = text
    return texts


def choose(
    model: Model,
    params: Params,
    tokenizer: Any,
    prompts: Sequence[str],
    options: Sequence[Sequence[str]],
    *,
    batch_size: int = 32,
) -> np.ndarray:
    """Which option each prompt makes likeliest.

    Args:
        model: the model.
        params: its parameters.
        tokenizer: a fast tokenizer.
        prompts: n texts that end before the answer.
        options: for each prompt its k possible answers.
        batch_size: rows (prompt and option together) at a time.
    Returns:
        [n] int, the index of the option with the largest log-probability, summed over
        its tokens (a mean would favour names of many tokens); -1 as `likeliest` says.
    Raises:
        ValueError: if the prompts differ in their number of options, a text is longer
            than the model's positions, or the model has no cache.
    """
    table = encode_options(model, tokenizer, prompts, options)
    rows = max(1, batch_size // table["options"].shape[1])
    logps = []
    for batch in tables.eval_batches(table, rows):
        valid = batch.pop("valid")
        logps.append(np.asarray(option_logps(model, params, batch))[valid])
    return likeliest(np.concatenate(logps))


def likeliest(scores: np.ndarray) -> np.ndarray:
    """The index of the largest score, [...] int of [..., k]; the first of equal ones.

    -1, which is no answer and so never right, where a score is NaN or none is finite:
    a model that has broken down must not seem to know what stands first.
    """
    most = np.max(scores, axis=-1)  # NaN if any is
    return np.where(np.isfinite(most), np.argmax(scores, axis=-1), -1)


def encode_options(
    model: Model,
    tokenizer: Any,
    prompts: Sequence[str],
    options: Sequence[Sequence[str]],
) -> dict[str, np.ndarray]:
    """The table that `option_logps` reads; arguments and errors are those of `choose`.

    Returns:
        tokens, mask: [n, P], what the options of a prompt begin with, padded left;
        options, real, counted: [n, k, S], the rest of each, `counted` on its answer.
    """
    counts = {len(each) for each in options}
    if len(counts) != 1 or len(options) != len(prompts):
        raise ValueError(
            "evaluate.choose needs as many options for every prompt, got "
            f"{len(prompts)} prompts and option counts {sorted(counts)}."
        )
    if model.decode is None:
        raise ValueError(
            "evaluate.choose needs a model with a key-value cache, got one without "
            "`extend`. Compare answer_logps of a table of prompts and options instead."
        )
    (count,) = counts
    table = tables.encode(
        tokenizer,
        [prompt for prompt in prompts for _ in range(count)],
        [option for each in options for option in each],
        pad="right",
    )
    longest = getattr(model.config, "longest", None)
    if longest is not None:
        tables.check_length(table, longest)
    prefix, suffix = _shared(table, count)
    return {**prefix, **suffix}


def _shared(table, count):
    """Cuts rows that come in groups into what a group shares and what each has.

    Returns:
        ({tokens, mask}: [n, P], padded left; {options, real, counted}: [n, count, S]).
    """
    tokens = table["tokens"].reshape(-1, count, table["tokens"].shape[1])
    mask = table["mask"].reshape(tokens.shape)
    answer = table["answer"].reshape(tokens.shape).copy()
    answer[:, :, 0] = False  # has nothing before it, as in terms.target_logps
    same = (tokens == tokens[:, :1]).all(1) & mask.all(1) & ~answer.any(1)
    shared = np.where(same.all(1), same.shape[1], same.argmin(1))
    longest = _rounded(shared.max())
    own = _rounded((mask.sum(2).max(1) - shared).max())
    at = shared[:, None] - longest + np.arange(longest)
    prefix = {
        "tokens": np.take_along_axis(tokens[:, 0], np.maximum(at, 0), axis=1),
        "mask": at >= 0,
    }
    at = shared[:, None, None] + np.arange(own)
    inside = at < tokens.shape[2]
    at = np.broadcast_to(np.minimum(at, tokens.shape[2] - 1), (*tokens.shape[:2], own))
    options, real, counted = (
        np.take_along_axis(x, at, axis=2) for x in (tokens, mask, answer)
    )
    suffix = {"options": options, "real": real & inside, "counted": counted & inside}
    return prefix, suffix


@partial(jax.jit, static_argnums=0)
def option_logps(model: Model, params: Params, batch: tables.Table) -> jax.Array:
    """Log-probability of each option, [B, k], nats, summed over its tokens.

    `batch` has rows of `encode_options`. Every prompt is run once; jax.vmap over
    stacked params asks several models at a time.
    """
    rows, count, own = batch["options"].shape
    length = batch["tokens"].shape[1]
    cache = model.init_cache(rows, length + own)
    hidden, cache = model.decode(params, batch, cache)
    cache = jax.tree.map(lambda x: _repeat(x, count), cache)
    options, real, counted = (
        batch[name].reshape(rows * count, own)
        for name in ("options", "real", "counted")
    )
    more, _ = model.decode(params, {"tokens": options, "mask": real}, cache)
    last = jnp.repeat(hidden[:, -1:], count, axis=0)
    logits = model.unembed(params, jnp.concatenate([last, more[:, :-1]], axis=1))
    logps = losses.token_logps(logits, options, where=counted)
    return logps.sum(axis=1).reshape(rows, count)


def _repeat(leaf, count):
    """Repeats the rows of a cache's leaf, each beside itself."""
    axis = rows_axis(leaf)
    return leaf if axis is None else jnp.repeat(leaf, count, axis=axis)


def _rounded(length) -> int:
    return max(1, -(-int(length) // tables.ROUND_TO)) * tables.ROUND_TO


def _on_mesh(function, model, params, batch, mesh):
    if mesh is None:
        return function(params, batch, model)
    with jax.set_mesh(mesh):
        return function(params, sharding.put_rows(batch, mesh), model)


@partial(jax.jit, static_argnums=2)
def _target_logps(params, batch, model):
    def values(logits, targets):
        return (losses.token_logps(logits, targets),)

    return _answer_values(params, batch, model, values)


@partial(jax.jit, static_argnums=2)
def _token_scores(params, batch, model):
    def values(logits, targets):
        return (
            losses.token_logps(logits, targets),
            metrics.greedy_hits(logits, targets),
            metrics.standardised_logps(logits, targets),
        )

    return _answer_values(params, batch, model, values)


def _answer_values(params, batch, model, values):
    """(*values, where) of every token, zero where it does not count."""
    cut = not jax.sharding.get_abstract_mesh().empty
    of_tokens = terms.target_values if cut else terms.counted_values
    found, where = of_tokens(model, params, batch, values)
    found = [jnp.where(where, x, jnp.zeros_like(x)) for x in found]
    # Whole on every device, so that every process can read all of it.
    return [sharding.constrain(x, None, None) for x in (*found, where)]


def _inputs(table: tables.Table) -> dict[str, np.ndarray]:
    fix = "data.encode makes both."
    _checks.has_keys("evaluate", "columns", ("tokens", "mask"), table, fix)
    known = ("tokens", "mask", "answer", "image")
    names = [name for name in known if name in table]
    return {name: np.asarray(table[name]) for name in names}
