# SPDX-License-Identifier: Apache-2.0
"""Running a model over tables and texts: what it knows, as numbers and as text.

| function | gives |
| --- | --- |
| `answer_logps` | log-probability of every row's answer, and its number of tokens |
| `perplexity` | exp of the mean negative log-probability of an answer token |
| `kl_from` | KL divergence from a reference model, as a function of params |
| `token_scores` | per token, in one pass: all that `metrics` need of teacher forcing |
| `reference_logps` | the table with a column `ref_logps`, as `losses.npo` needs it |
| `completions` | greedy continuations of prompts, as text |
| `eos_ids`, `decode` | the tokens at which a text ends; the text up to there |
| `choose` | the index of the most probable choice of every prompt |
| `encode_choices`, `choice_logps`, `best_choice` | the three steps of `choose` |

    forget = data.encode(tokenizer, prompts, answers)
    logps, lengths = evaluate.answer_logps(model, params, forget)
    texts = evaluate.completions(model, params, tokenizer, prompts, max_new_tokens=16)

Every function compiles once per model and batch shape. The last batch is filled with
copies of rows, whose results are dropped.

Over 400 lines because the ways of running a model over rows share their batches.
"""

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from jaxunlearn import _checks, _packed, losses, metrics, sharding, terms
from jaxunlearn._ahead import one_behind
from jaxunlearn._generate import generate, prepare_params, rows_axis
from jaxunlearn.data import table as tables
from jaxunlearn.terms._chunks import aligned, chunk_size, counted_values, in_chunks
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
            such rows. Without `answer` every real token counts.
        batch_size: rows per batch; data * fsdp * expert of the mesh must divide it.
        mesh: the mesh of the params, if they are on one. With several processes, all
            call this function with the complete table; each reads and computes its part
            of the rows, and all return the values of all rows.
    Returns:
        (logps [n] float32, nats, summed over the answer; lengths [n] int32, tokens of
        the answer).
    Raises:
        ValueError: naming the row, for token ids outside the model's vocabulary.
    """
    settings = dict(batch_size=batch_size, mesh=mesh)
    logps, where = _values(_logps, "answer_logps", model, params, table, **settings)
    return logps.sum(axis=1), where.sum(axis=1, dtype=np.int32)


class TokenScores(NamedTuple):
    """Scores of every answer token under teacher forcing, as `metrics` read them.

    Column t is about token t + 1. Outside the answer, `where` is False and the other
    arrays are 0 or False.

    Attributes:
        logps: [n, L - 1] float32, log-probability of the token, nats.
        hits: [n, L - 1] bool, whether it is the most probable token.
        standardised: [n, L - 1] float32, (log-probability - mean) / standard deviation
            over the vocabulary, as Min-K%++ uses it.
        where: [n, L - 1] bool, whether the token belongs to the answer.
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
    """Scores of every answer token, in one forward pass per row.

        scores = evaluate.token_scores(model, params, table)
        metrics.probability(scores.logps, where=scores.where)           # [n]
        metrics.extraction_strength(scores.hits, where=scores.where)
        metrics.mia_min_k(scores.logps, where=scores.where)
        metrics.mia_min_k(scores.standardised, where=scores.where)      # Min-K%++

    Arguments and errors are those of `answer_logps`. No array of shape [B, L, V] is
    created.
    """
    settings = dict(batch_size=batch_size, mesh=mesh)
    found = _values(_token_scores, "token_scores", model, params, table, **settings)
    return TokenScores(*found)


def reference_logps(
    model: Model,
    params: Params,
    table: tables.Table | tables.Source,
    *,
    batch_size: int = 16,
    mesh: Mesh | None = None,
) -> tables.Table | tables.Source:
    """The table with a column `ref_logps` [n] float32: `answer_logps` of these params.

    Call it once with the original params, before unlearning; the reference model is
    then not needed again. Arguments and errors are those of `answer_logps`.
    """
    logps, _ = answer_logps(model, params, table, batch_size=batch_size, mesh=mesh)
    return tables.with_columns(table, {"ref_logps": logps.astype(np.float32)})


def perplexity(
    model: Model, params: Params, table: tables.Table, *, batch_size: int = 16
) -> float:
    """exp(mean negative log-probability of an answer token), a mean over all tokens.

    Raises:
        ValueError: if no row has an answer token.
    """
    logps, lengths = answer_logps(model, params, table, batch_size=batch_size)
    if not lengths.sum():
        raise ValueError("perplexity needs at least one answer token, got none.")
    nll = -float(logps.sum(dtype=np.float64)) / int(lengths.sum())
    return math.exp(nll) if nll < 700 else math.inf


def kl_from(
    model: Model,
    ref_params: Params,
    table: tables.Table | tables.Source,
    *,
    batch_size: int = 16,
    mesh: Mesh | None = None,
) -> Callable[[Params], float]:
    """A function from params to their KL divergence from a reference, on fixed rows.

        damage = evaluate.kl_from(model, original, prose)
        damage(params)  # nats per token

    It is the mean of KL(reference || params) over the answer tokens of the table (every
    real token without `answer`), the usual measure of what an edit costs elsewhere. The
    hidden states of the reference after its last layer are computed once and stored,
    [n, L, D], so each call is one forward pass and two unembeddings.

    Args:
        model: the model.
        ref_params: the reference, such as the original model. They stay in memory.
        table, batch_size, mesh: as `answer_logps`.
    Returns:
        A function params -> mean divergence, >= 0; nan or inf where the logits are not
        finite.
    Raises:
        ValueError: naming the row, for token ids outside the model's vocabulary, or if
            no token counts.
    """
    stored = []
    for batch, valid in _batches("kl_from", model, table, batch_size, mesh):
        counts, rows = batch.get("answer", batch["mask"]), len(batch["mask"])
        first = 0 if mesh is None else jax.process_index() * rows
        # Copies of rows that fill the last batch do not count.
        batch["answer"] = counts & valid[first : first + rows, None]
        stored.append((batch, _on_mesh(_hidden, model, ref_params, batch, mesh)))
    if not any(batch["answer"].any() for batch, _ in stored):
        raise ValueError("kl_from needs at least one token that counts, got none.")

    def divergence(params: Params) -> float:
        sums = [
            _on_mesh(
                partial(_kl_sums, ref_params=ref_params, ref_hidden=hidden),
                model,
                params,
                batch,
                mesh,
            )
            for batch, hidden in stored
        ]
        sums = jax.device_get(sums)  # read when all were started
        total, count = (sum(float(x) for x in part) for part in zip(*sums, strict=True))
        return total / count

    return divergence


def completions(
    model: Model,
    params: Params,
    tokenizer: Any,
    prompts: Sequence[str],
    *,
    prompt_format: tables.PromptFormat = tables.PLAIN,
    eos_ids: int | Sequence[int] | None = None,
    max_new_tokens: int = 8,
    batch_size: int = 32,
    mesh: Mesh | None = None,
) -> list[str]:
    """Greedy continuation of every prompt, as text without the prompt.

    Prompts are batched in the order of their lengths, which saves padding. Results are
    in the order of `prompts`.

    Args:
        model: a model with a key-value cache.
        params: its parameters.
        tokenizer: a fast tokenizer.
        prompts: n texts, or conversations, see data.render. A text without a token is
            replaced by the begin token.
        prompt_format: how prompts are given to the model.
        eos_ids: id of the token at which a continuation ends, or several; None for
            those of the function `eos_ids`. A format's end that is ordinary text, such
            as a blank line, ends a continuation too. Neither is part of the text.
        max_new_tokens: largest number of tokens of each continuation.
        batch_size: prompts per batch; data * fsdp * expert of the mesh must divide it.
        mesh: the mesh of the params, if they are on one; rows and caches are sharded
            over it.
    Raises:
        TypeError: for one text in place of a list.
        ValueError: as `generate`, for a row that is not a text or has a token outside
            the model's vocabulary, or for a mesh of several processes.
    """
    _checks.positive_int("completions", batch_size=batch_size)
    if mesh is not None and jax.process_count() > 1:
        raise ValueError(
            f"completions needs a mesh of one process, got {jax.process_count()}. Save "
            "the params and generate in one process."
        )
    prompts = tables.begun("evaluate.completions", tokenizer, prompts, prompt_format)
    if not prompts:
        return []
    if eos_ids is None:
        eos_ids = _eos_ids(model, tokenizer, prompt_format)
    table = tables.encode(tokenizer, prompts, prompt_format=prompt_format)
    _checks.token_ids("evaluate.completions", model, table, tokenizer=tokenizer)
    lengths = table["mask"].sum(axis=1)
    order = np.argsort(lengths, kind="stable")
    max_length = getattr(model.config, "max_length", table["tokens"].shape[1])
    max_width = max_length - max_new_tokens
    texts = [""] * len(prompts)
    params = prepare_params(model, params)
    settings = dict(max_new_tokens=max_new_tokens, eos_ids=eos_ids)

    def started(start):
        index = order[start : start + batch_size]
        full = np.resize(index, batch_size)  # the last batch repeats its first rows
        longest = lengths[index].max()
        # Past max_width generate raises, naming the prompt that is too long.
        width = max(longest, min(tables.rounded_length(longest), max_width))
        batch = {name: table[name][full, :width] for name in ("tokens", "mask")}
        if mesh is None:
            return index, generate(model, params, batch, **settings)
        with jax.set_mesh(sharding.auto_axes(mesh)):
            rows = sharding.put_rows(batch, mesh)
            return index, generate(model, params, rows, **settings)

    for index, new in one_behind(map(started, range(0, len(order), batch_size))):
        decoded = decode(tokenizer, new, eos_ids, prompt_format)
        for row, text in zip(index, decoded, strict=False):
            texts[row] = text
    return texts


def eos_ids(
    model: Model, tokenizer: Any, prompt_format: tables.PromptFormat = tables.PLAIN
) -> tuple[int, ...]:
    """Ids of the tokens at which a text ends, in increasing order.

    They are the ids that generation_config.json and config.json of the checkpoint name
    (`eos_token_id`, one or several; for a GGUF file its end of text and end of turn),
    the tokenizer's end token, and special tokens in the end of the format.
    """
    found = {*getattr(model.config, "eos_ids", ()), tokenizer.eos_token_id}
    found |= set(tables.end_ids(tokenizer, prompt_format))
    return tuple(sorted(found - {None}))


_eos_ids = eos_ids  # for functions with an argument of this name


def decode(
    tokenizer: Any,
    tokens: Any,
    eos_ids: int | Sequence[int],
    prompt_format: tables.PromptFormat = tables.PLAIN,
) -> list[str]:
    """The texts of generated tokens, each up to its first end.

    Args:
        tokenizer: a transformers tokenizer.
        tokens: [n, L] int, new tokens as `generate` returns them.
        eos_ids: id that ends a text and is not part of it, or several.
        prompt_format: its `end` also ends a text, if it is ordinary text.
    """
    tokens = np.asarray(tokens)
    ended = np.isin(tokens, np.asarray(eos_ids, np.int32)).cumsum(axis=1) > 0
    rows = [row[~done].tolist() for row, done in zip(tokens, ended, strict=True)]
    texts = tokenizer.batch_decode(rows, skip_special_tokens=True)
    (example,) = tables.render(tokenizer, ["x"], ["x"], prompt_format)
    if not example.end or tables.end_ids(tokenizer, prompt_format):
        return texts
    return [metrics.truncate_at_stop(text, [example.end]) for text in texts]


def choose(
    model: Model,
    params: Params,
    tokenizer: Any,
    prompts: Sequence[str],
    choices: Sequence[Sequence[str]],
    *,
    prompt_format: tables.PromptFormat = tables.PLAIN,
    batch_size: int = 32,
) -> np.ndarray:
    """The index of the most probable choice of every prompt.

    Args:
        model: a model with a key-value cache.
        params: its parameters.
        tokenizer: a fast tokenizer.
        prompts: n texts that end before the answer. One without a token is replaced by
            the begin token.
        choices: for each prompt its k possible answers.
        prompt_format: how prompt and choice are joined; its end is scored with every
            choice.
        batch_size: rows (prompt and choice together) per batch.
    Returns:
        [n] int, the index of the choice with the largest log-probability, summed over
        its tokens (a mean would favour choices with many tokens); -1 if the scores are
        not finite, see `best_choice`.
    Raises:
        TypeError: for one text in place of a list of prompts or of choices.
        ValueError: if prompts differ in their number of choices, a value is not a text,
            a text is longer than the model's positions, or the model has no cache.
    """
    rows, num_choices = _choice_rows(model, tokenizer, prompts, choices, prompt_format)
    if rows["tokens"].size and _packed.supports(model, rows):
        logps, _ = answer_logps(model, params, rows, batch_size=batch_size)
        return best_choice(logps.reshape(-1, num_choices))
    table = _split_shared(rows, num_choices)
    rows = max(1, batch_size // num_choices)
    started = (
        (batch.pop("valid"), choice_logps(model, params, batch))
        for batch in tables.eval_batches(table, rows)
    )
    logps = [np.asarray(each)[valid] for valid, each in one_behind(started)]
    return best_choice(np.concatenate(logps))


def best_choice(scores: np.ndarray) -> np.ndarray:
    """The index of the largest score, [..., k] -> [...] int; the first if several tie.

    The index is -1, which is never right, where a score is NaN or no score is finite.
    Otherwise a model that diverged would seem to know every first choice.
    """
    largest = np.max(scores, axis=-1)  # NaN if any score is
    return np.where(np.isfinite(largest), np.argmax(scores, axis=-1), -1)


def encode_choices(
    model: Model,
    tokenizer: Any,
    prompts: Sequence[str],
    choices: Sequence[Sequence[str]],
    *,
    prompt_format: tables.PromptFormat = tables.PLAIN,
) -> dict[str, np.ndarray]:
    """The table that `choice_logps` reads; arguments and errors are those of `choose`.

    Returns:
        `tokens`, `mask` [n, P]: the tokens that all choices of a prompt start with,
        padded left; `choices` [n, k, S]: the remaining tokens of each choice,
        `choice_mask` which of them are real, `choice_answer` which belong to the
        answer.
    """
    return _split_shared(
        *_choice_rows(model, tokenizer, prompts, choices, prompt_format)
    )


def _choice_rows(model, tokenizer, prompts, choices, prompt_format):
    """(a table with a row for each prompt and choice, choices of each prompt)."""
    owner = "evaluate.choose"
    prompts = tables.begun(owner, tokenizer, prompts, prompt_format)
    for row, each in enumerate(choices):
        _checks.texts(owner, **{f"choices[{row}]": each})
    counts = {len(each) for each in choices}
    if len(counts) != 1 or len(choices) != len(prompts):
        raise ValueError(
            "evaluate.choose needs one list of choices per prompt, all of one length, "
            f"got {len(prompts)} prompts and lists of lengths {sorted(counts)}."
        )
    if model.decode is None:
        raise ValueError(
            "evaluate.choose needs a model with a key-value cache, got one without "
            "`decode`. Compare answer_logps of a table of prompts and choices instead."
        )
    (num_choices,) = counts
    table = tables.encode(
        tokenizer,
        [prompt for prompt in prompts for _ in range(num_choices)],
        [choice for each in choices for choice in each],
        prompt_format=prompt_format,
    )
    shape = (len(prompts), num_choices, -1)
    rows = {name: table[name].reshape(shape) for name in ("tokens", "mask")}
    _checks.token_ids(owner, model, rows, tokenizer=tokenizer)
    max_length = getattr(model.config, "max_length", None)
    if max_length is not None:
        tables.check_length(table, max_length)
    return table, num_choices


def _split_shared(table, num_choices):
    """Splits each prompt's rows into the tokens they share and the rest of each."""
    tokens = table["tokens"].reshape(-1, num_choices, table["tokens"].shape[1])
    mask = table["mask"].reshape(tokens.shape)
    answer = table["answer"].reshape(tokens.shape).copy()
    answer[:, :, 0] = False  # nothing predicts the first token, as in target_logps
    same = (tokens == tokens[:, :1]).all(1) & mask.all(1) & ~answer.any(1)
    shared = np.where(same.all(1), same.shape[1], same.argmin(1))  # [n], tokens
    width = tables.rounded_length(shared.max())
    rest = tables.rounded_length((mask.sum(2).max(1) - shared).max())
    index = shared[:, None] - width + np.arange(width)
    prefix = {
        "tokens": np.take_along_axis(tokens[:, 0], np.maximum(index, 0), axis=1),
        "mask": index >= 0,
    }
    index = shared[:, None, None] + np.arange(rest)
    inside = index < tokens.shape[2]
    index = np.minimum(index, tokens.shape[2] - 1)
    index = np.broadcast_to(index, (*tokens.shape[:2], rest))
    choices, choice_mask, choice_answer = (
        np.take_along_axis(x, index, axis=2) for x in (tokens, mask, answer)
    )
    return prefix | {
        "choices": choices,
        "choice_mask": choice_mask & inside,
        "choice_answer": choice_answer & inside,
    }


def choice_logps(model: Model, params: Params, batch: tables.Table) -> jax.Array:
    """Log-probability of each choice, [B, k] float32, nats, summed over its tokens.

    Every prompt is run once, and its cache is shared by its choices, unless a choice
    may pass the length where rotary positions change (`longrope`, `dynamic`): then each
    row runs in one pass. jax.vmap over stacked params evaluates several models at once.

    Args:
        model: a model with a key-value cache.
        params: its parameters.
        batch: B rows of `encode_choices`.
    Raises:
        ValueError: naming row and position, for an id outside the model's vocabulary.
            Traced batches are not checked.
    """
    owner = "evaluate.choice_logps"
    _checks.token_ids(owner, model, batch)
    choices = {"tokens": batch["choices"], "mask": batch["choice_mask"]}
    _checks.token_ids(f"{owner}: choices", model, choices)
    return _choice_logps(model, params, batch)


@partial(jax.jit, static_argnums=0)
def _choice_logps(model: Model, params: Params, batch: tables.Table) -> jax.Array:
    rows, num_choices, rest = batch["choices"].shape
    width = batch["tokens"].shape[1]
    choices, mask, answer = (
        batch[name].reshape(rows * num_choices, rest)
        for name in ("choices", "choice_mask", "choice_answer")
    )
    last = {"tokens": choices, "mask": mask}
    limit = getattr(model.config, "cache_limit", None)
    if limit is not None and width + rest > limit:
        prefix = {name: jnp.repeat(batch[name], num_choices, axis=0) for name in last}
        full = {name: jnp.concatenate([prefix[name], last[name]], 1) for name in last}
        cache = model.init_cache(rows * num_choices, width + rest)
        hidden = model.decode(params, full, cache)[0][:, width - 1 : -1]
    else:
        hidden, cache = model.decode(
            params, batch, model.init_cache(rows, width + rest)
        )
        cache = jax.tree.map(lambda x: _repeat(x, num_choices), cache)
        after, _ = model.decode(params, last, cache)
        before = jnp.repeat(hidden[:, -1:], num_choices, axis=0)
        hidden = jnp.concatenate([before, after[:, :-1]], axis=1)
    logits = model.unembed(params, hidden)
    logps = losses.token_logps(logits, choices, where=answer)
    return logps.sum(axis=1).reshape(rows, num_choices)


def _repeat(leaf, times):
    """Repeats every row of a leaf of a cache, copies of a row next to each other."""
    axis = rows_axis(leaf)
    return leaf if axis is None else jnp.repeat(leaf, times, axis=axis)


def _values(function, owner, model, params, table, *, batch_size, mesh):
    """(*function's values of every token, 0 outside the answer; where)."""
    _checks.positive_int(f"evaluate.{owner}", batch_size=batch_size)
    if mesh is None and _packed.supports(model, table):
        _checks.token_ids(f"evaluate.{owner}", model, table)
        found, where = _packed.scores(
            model, params, table, function, batch_size=batch_size
        )
        return *found, where
    run = partial(_answer_values, function=function)
    started = (
        (_on_mesh(run, model, params, batch, mesh), valid)
        for batch, valid in _batches(owner, model, table, batch_size, mesh)
    )
    parts = [
        [np.asarray(x)[valid] for x in each] for each, valid in one_behind(started)
    ]
    return tuple(map(np.concatenate, zip(*parts, strict=True)))


def _batches(owner, model, table, batch_size, mesh):
    """(this process's rows of each batch, `valid` of all rows of the batch)."""
    owner = f"evaluate.{owner}"
    shard = (0, 1) if mesh is None else (jax.process_index(), jax.process_count())
    row = shard[0] * (batch_size // shard[1])
    for batch in tables.eval_batches(table, batch_size, shard=shard):
        fix = "data.encode makes both."
        _checks.has_keys(owner, "columns", ("tokens", "mask"), batch, fix)
        _checks.token_ids(owner, model, batch, first_row=row)
        row += batch_size
        names = [x for x in ("tokens", "mask", "answer", "image") if x in batch]
        yield {name: batch[name] for name in names}, batch["valid"]


def _on_mesh(function, model, params, batch, mesh):
    if mesh is None:
        return function(params, batch, model)
    with jax.set_mesh(sharding.auto_axes(mesh)):
        return function(params, sharding.put_rows(batch, mesh), model)


def _logps(logits, targets):
    return (losses.token_logps(logits, targets),)


def _token_scores(logits, targets):
    return (
        losses.token_logps(logits, targets),
        metrics.greedy_hits(logits, targets),
        metrics.standardised_logps(logits, targets),
    )


@partial(jax.jit, static_argnums=2)
def _hidden(params, batch, model):
    return model.apply(params, batch).hidden


@partial(jax.jit, static_argnums=2)
def _kl_sums(params, batch, model, *, ref_params, ref_hidden):
    """(sum of the divergences, number of tokens) of one batch."""
    hidden = model.apply(params, batch).hidden
    _, where = aligned(batch)

    def piece(hidden, ref_hidden, where):
        logits = model.unembed(params, hidden)
        ref_logits = model.unembed(ref_params, ref_hidden)
        return losses.kl(logits, ref_logits, where=where)

    chunk = chunk_size(model, params, hidden)
    values = in_chunks(piece, chunk, hidden, ref_hidden, where)
    return jnp.sum(values), jnp.sum(where, dtype=jnp.int32)


@partial(jax.jit, static_argnames=("model", "function"))
def _answer_values(params, batch, model, function):
    """(*values, where) of every token, zero outside the answer."""
    on_mesh = not jax.sharding.get_abstract_mesh().empty
    of_tokens = terms.target_values if on_mesh else counted_values
    found, where = of_tokens(model, params, batch, function)
    found = [jnp.where(where, x, jnp.zeros_like(x)) for x in found]
    # Replicated on every device, so that every process can read all rows.
    return [sharding.constrain(x, None, None) for x in (*found, where)]
