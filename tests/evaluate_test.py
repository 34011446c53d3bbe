# SPDX-License-Identifier: Apache-2.0
"""Evaluation against plain NumPy, whatever the batches, the padding and the order."""

import itertools
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from numpy.testing import assert_allclose, assert_array_equal

import jaxunlearn as ju
from jaxunlearn import combine, evaluate, losses, sharding, terms
from jaxunlearn.data import table
from tests import tiny

PROMPTS = (
    "The capital of France is",
    "In Bosnia and Herzegovina, the capital is the city of",
    "A young dog",
    "Everyone knows that the river flows to the sea, and that the capital of Kenya is",
    "Quick, name it:",
)
# One to a dozen tokens; some start with the same tokens.
OPTIONS = ("Paris", "Paris at the river", "the city of Nairobi", "Zürich", "a puppy")
VOCAB = 400


@pytest.fixture(scope="module")
def tokenizer():
    return tiny.tiny_tokenizer()


@pytest.fixture(scope="module")
def rows():
    """11 ragged rows as NumPy columns, one of them without an answer."""
    batch = tiny.tiny_batch(rows=11, length=16)
    columns = {name: np.array(column) for name, column in batch.items()}
    columns["answer"][4] = False
    return columns


def plain(model, params, columns):
    """(summed logps [n], counts [n]) by a NumPy log-softmax over every logit."""
    logits = model.unembed(params, model.apply(params, columns).hidden)
    logits = np.asarray(logits, np.float64)[:, :-1]
    logits -= logits.max(-1, keepdims=True)
    logps = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    logps = np.take_along_axis(logps, columns["tokens"][:, 1:, None], 2)[..., 0]
    mask = columns["mask"]
    where = columns.get("answer", mask)[:, 1:] & mask[:, 1:] & mask[:, :-1]
    return np.where(where, logps, 0).sum(1), where.sum(1)


def padded(columns, left, right):
    """The rows with junk on either side, masked out."""

    def widen(name, column):
        fill = {"tokens": 7, "mask": False, "answer": True}[name]
        return np.pad(column, ((0, 0), (left, right)), constant_values=fill)

    return {name: widen(name, column) for name, column in columns.items()}


def _distance(logps, ref_logps):
    return jnp.abs(logps - ref_logps)


# Log-probabilities.


@pytest.mark.parametrize("size", [4, pytest.param(16, marks=pytest.mark.slow)])
def test_answer_logps_equal_a_direct_computation(rows, size):
    model, params = tiny.tiny_model()
    logps, lengths = evaluate.answer_logps(model, params, rows, batch_size=size)
    expected, counts = plain(model, params, rows)
    assert logps.shape == lengths.shape == (11,)
    assert (logps.dtype, lengths.dtype) == (np.float32, np.int32)
    assert_allclose(logps, expected, rtol=1e-5, atol=1e-5)
    assert_array_equal(lengths, counts)
    assert lengths[4] == logps[4] == 0 and len(set(lengths.tolist())) > 3


def test_padding_and_the_order_of_rows_do_not_matter(rows):
    model, params = tiny.tiny_model()
    expected, counts = evaluate.answer_logps(model, params, rows)
    for left, right in ((0, 5), (5, 0), (2, 3)):
        wider = padded(rows, left, right)
        logps, lengths = evaluate.answer_logps(model, params, wider)
        assert_allclose(logps, expected, rtol=1e-5, atol=1e-5)
        assert_array_equal(lengths, counts)
    order = np.random.default_rng(1).permutation(11)
    shuffled = {name: column[order] for name, column in rows.items()}
    logps, lengths = evaluate.answer_logps(model, params, shuffled)
    assert_allclose(logps, expected[order], rtol=1e-5, atol=1e-5)
    assert_array_equal(lengths, counts[order])


def test_without_an_answer_column_every_token_but_the_first_counts(rows):
    model, params = tiny.tiny_model()
    columns = {name: rows[name] for name in ("tokens", "mask")}
    logps, lengths = evaluate.answer_logps(model, params, columns)
    assert_array_equal(lengths, rows["mask"].sum(1) - 1)
    assert_allclose(logps, plain(model, params, columns)[0], rtol=1e-5)
    unread = columns | {"ref_logps": np.zeros(11), "names": np.array(["a"] * 11)}
    again, _ = evaluate.answer_logps(model, params, unread)
    assert_array_equal(again, logps)


def test_perplexity_is_over_tokens_not_rows(rows):
    model, params = tiny.tiny_model()
    logps, counts = plain(model, params, rows)
    expected = np.exp(-logps.sum() / counts.sum())
    for size in (3, 16):
        value = evaluate.perplexity(model, params, rows, batch_size=size)
        assert type(value) is float
        assert_allclose(value, expected, rtol=1e-5)
    by_rows = np.exp(-np.mean(logps[counts > 0] / counts[counts > 0]))
    assert abs(by_rows / expected - 1) > 1e-3  # the premise


def test_a_uniform_model_has_the_perplexity_of_its_vocabulary(rows):
    model, params = tiny.tiny_model()
    flat = jax.tree.map(lambda x: 0 * x, params)
    assert_allclose(evaluate.perplexity(model, flat, rows), 32, rtol=1e-5)


def test_reference_logps_put_npo_at_its_reference(rows):
    model, params = tiny.tiny_model()
    forget = evaluate.reference_logps(model, params, rows, batch_size=4)
    assert set(forget) == {"tokens", "mask", "answer", "ref_logps"}
    assert "ref_logps" not in rows
    assert forget["ref_logps"].dtype == np.float32
    logps, _ = evaluate.answer_logps(model, params, rows, batch_size=4)
    assert_array_equal(forget["ref_logps"], logps)

    beta = 0.3
    parts = {
        "forget": terms.on_logps(partial(losses.npo, beta=beta), model, "forget"),
        "apart": terms.on_logps(_distance, model, "forget", chunk=3),
    }
    # The distance is measured alone: its slope at 0 is the sign of rounding.
    weights = {"forget": 1.0, "apart": 0.0}
    tx = optax.chain(combine.weighted_sum(weights), optax.sgd(0.1))
    step = jax.jit(ju.make_step(parts, tx))
    state = ju.init_state(params, tx, jax.random.key(0))
    state, log = ju.fit(step, state, [{"forget": forget}], steps=1)
    assert_allclose(log[0]["forget/loss"], 2 * np.log(2) / beta, rtol=1e-5)
    assert_allclose(log[0]["apart/loss"], 0, atol=1e-4)  # for each of the ten answers
    # After a step the weights differ from the reference.
    _, log = ju.fit(step, state, [{"forget": forget}], steps=2)
    assert log[0]["forget/loss"] < 2 * np.log(2) / beta - 0.1


# Choices.


def option_logps(model, params, tokenizer, prompts, options):
    """Log-probabilities [prompts, options], with every text run completely."""
    texts = [(p, o) for p, each in zip(prompts, options, strict=True) for o in each]
    columns = table.encode(tokenizer, *zip(*texts, strict=True))
    logps, _ = evaluate.answer_logps(model, params, columns)
    return logps.reshape(len(prompts), -1), columns


@pytest.mark.parametrize("size", [pytest.param(1, marks=pytest.mark.slow), 12])
def test_choose_returns_the_most_probable_choice(tokenizer, size):
    model, params = tiny.tiny_model(vocab=VOCAB)
    prompts = list(PROMPTS)
    options = [np.roll(OPTIONS, i).tolist() for i in range(len(prompts))]
    logps, columns = option_logps(model, params, tokenizer, prompts, options)
    counts = columns["answer"].sum(1).reshape(logps.shape)
    assert len(set(counts[0].tolist())) > 2
    chosen = evaluate.choose(
        model, params, tokenizer, prompts, options, batch_size=size
    )
    assert chosen.shape == (len(prompts),)
    assert_array_equal(chosen, logps.argmax(1))


@pytest.mark.parametrize(
    "name", [pytest.param("plain", marks=pytest.mark.slow), "windows", "longrope"]
)
def test_choose_between_any_two_orders_them_by_summed_logps(tokenizer, name):
    settings = {
        "windows": {"windows": (4, None, 2)},
        "longrope": {"rope": tiny.LONGROPE},
    }
    model, params = tiny.tiny_model(vocab=VOCAB, **settings.get(name, {}))
    # Longer prompts to several words each, so that shorter is not always likelier.
    pairs = [
        (prompt, pair)
        for prompt in PROMPTS
        for pair in itertools.combinations((*OPTIONS, "the sea", "Sarajevo"), 2)
    ]
    prompts, options = zip(*pairs, strict=True)
    logps, columns = option_logps(model, params, tokenizer, prompts, options)
    clear = np.abs(logps[:, 0] - logps[:, 1]) > 1e-3
    chosen = evaluate.choose(model, params, tokenizer, prompts, options)
    assert clear.mean() > 0.9
    assert_array_equal(chosen[clear], logps.argmax(1)[clear])
    assert 0.1 < chosen.mean() < 0.9
    shorter = columns["answer"].sum(1).reshape(logps.shape).argmin(1)
    assert (chosen != shorter)[clear].any()


def test_choose_counts_the_tokens_that_choices_share(tokenizer):
    # "Paris" is at least as probable as "Paris at the river".
    model, params = tiny.tiny_model(vocab=VOCAB)
    pairs = [["Paris", "Paris at the river"], ["Paris at the river", "Paris"]]
    chosen = evaluate.choose(model, params, tokenizer, PROMPTS[:2], pairs)
    assert_array_equal(chosen, [0, 1])
    same = evaluate.choose(model, params, tokenizer, PROMPTS[:1], [["Paris"] * 3])
    assert_array_equal(same, [0])


def test_choose_with_empty_prompts(tokenizer):
    # The begin token takes the place of a prompt without tokens.
    model, params = tiny.tiny_model(vocab=VOCAB)
    words = ("Paris at the river", "Nairobi at the sea", "the city", "river", "puppy")
    options = list(itertools.permutations(words, 2))
    begin = [tokenizer.bos_token] * len(options)
    logps, _ = option_logps(model, params, tokenizer, begin, options)
    for prompts in ([""] * len(options), begin):
        chosen = evaluate.choose(model, params, tokenizer, prompts, options)
        assert_array_equal(chosen, logps.argmax(1))


def test_choose_refuses_invalid_calls(tokenizer):
    model, params = tiny.tiny_model(vocab=VOCAB)
    choose = partial(evaluate.choose, model, params, tokenizer)
    with pytest.raises(ValueError, match=r"2 prompts.*\[2, 3\]"):
        choose(["a", "b"], [["c", "d"], ["c", "d", "e"]])
    with pytest.raises(ValueError, match=r"1 prompts.*\[2\]"):
        choose(["a"], [["c", "d"]] * 2)
    with pytest.raises(ValueError, match="got 0 prompts"):
        choose([], [])
    with pytest.raises(ValueError, match="rows of at most 64 tokens"):
        choose(["many words " * 40], [["c", "d"]])
    with pytest.raises(TypeError, match="prompts, got 'ab'"):
        choose("ab", [["c", "d"]] * 2)
    with pytest.raises(TypeError, match=r"choices\[1\], got 'Rome'"):
        choose(["a", "b"], [["c", "d", "e", "f"], "Rome"])
    bare = model._replace(init_cache=None, decode=None)
    with pytest.raises(ValueError, match="without `decode`"):
        evaluate.choose(bare, params, tokenizer, ["a"], [["c", "d"]])


# Completions.


def one_by_one(model, params, tokenizer, prompts, new):
    """Text of every prompt generated alone, cut at the end token."""
    texts = []
    for prompt in prompts:
        ids = alone(model, params, tokenizer, prompt, new)
        ended = np.flatnonzero(ids == tokenizer.eos_token_id)
        texts.append(tokenizer.decode(ids[: ended[0]] if len(ended) else ids))
    return texts


def alone(model, params, tokenizer, prompt, new):
    columns = table.encode(tokenizer, [prompt], length=32, padding_side="left")
    return np.asarray(ju.generate(model, params, columns, max_new_tokens=new))[0]


@pytest.mark.parametrize("size", [2, pytest.param(32, marks=pytest.mark.slow)])
def test_completions_are_in_the_order_of_the_prompts(tokenizer, size):
    model, params = tiny.tiny_model(vocab=VOCAB)
    expected = one_by_one(model, params, tokenizer, PROMPTS, 5)
    assert len(set(expected)) > 2
    run = partial(evaluate.completions, model, params, tokenizer, max_new_tokens=5)
    assert run(list(PROMPTS), batch_size=size) == expected
    assert run(PROMPTS[::-1], batch_size=size) == expected[::-1]


def test_completions_end_at_the_end_token(tokenizer):
    model, params = tiny.tiny_model(vocab=VOCAB)
    new = alone(model, params, tokenizer, PROMPTS[0], 5)
    last = int(next(x for x in new if x != new[0]))
    # Two tokens are swapped, so that the model generates </s> instead of `last`.
    order = np.arange(VOCAB)
    order[[last, tokenizer.eos_token_id]] = tokenizer.eos_token_id, last
    swapped = params | {
        "embed": {"embedding": params["embed"]["embedding"][order]},
        "unembed": {"kernel": params["unembed"]["kernel"][:, order]},
    }
    assert last not in tokenizer(PROMPTS[0])["input_ids"]
    texts = evaluate.completions(model, swapped, tokenizer, PROMPTS, max_new_tokens=5)
    assert texts == one_by_one(model, swapped, tokenizer, PROMPTS, 5)
    assert texts[0] == tokenizer.decode(new[: new.tolist().index(last)])
    settings = dict(max_new_tokens=5, eos_ids=last)
    one = evaluate.completions(model, params, tokenizer, PROMPTS[:1], **settings)
    assert one == texts[:1]


def test_completions_of_nothing_and_errors(tokenizer):
    model, params = tiny.tiny_model(vocab=VOCAB)
    run = partial(evaluate.completions, model, params, tokenizer)
    assert run([]) == []
    with pytest.raises(ValueError, match="within 64 positions"):
        run(["many words " * 40])
    with pytest.raises(ValueError, match="batch_size >= 1, got batch_size=0"):
        run(["a"], batch_size=0)
    with pytest.raises(TypeError, match="'a text'"):
        run("a text")
    with pytest.raises(ValueError, match="None .* row 1"):
        run(["a", None])


def test_an_empty_prompt_begins_with_the_begin_token_and_spoils_no_other(tokenizer):
    model, params = tiny.tiny_model(vocab=VOCAB)
    run = partial(evaluate.completions, model, params, tokenizer, max_new_tokens=5)
    begin = one_by_one(model, params, tokenizer, [tokenizer.bos_token], 5)
    others = one_by_one(model, params, tokenizer, PROMPTS, 5)
    assert run([PROMPTS[0], "", *PROMPTS[1:]]) == [others[0], *begin, *others[1:]]
    nothing = {"tokens": np.zeros((2, 4), np.int32), "mask": np.eye(2, 4) > 2}
    with pytest.raises(ValueError, match="row 0"):
        ju.generate(model, params, nothing, max_new_tokens=2)
    bare = tiny.tiny_tokenizer()
    bare.bos_token = bare.eos_token = None
    with pytest.raises(ValueError, match="'' in row 1"):
        evaluate.completions(model, params, bare, ["a", ""])


# Errors.


def test_tables_without_rows_or_columns_are_errors(rows):
    model, params = tiny.tiny_model()
    empty = {name: column[:0] for name, column in rows.items()}
    without = {name: rows[name] for name in ("tokens", "answer")}
    silent = rows | {"answer": np.zeros_like(rows["answer"])}
    for function in (
        evaluate.answer_logps,
        evaluate.reference_logps,
        evaluate.perplexity,
    ):
        with pytest.raises(ValueError, match="set is empty"):
            function(model, params, empty)
        with pytest.raises(KeyError, match="reads columns 'mask', but there is"):
            function(model, params, without)
        with pytest.raises(ValueError, match="at most 64 tokens, got 66"):
            function(model, params, padded(rows, 50, 0))
        with pytest.raises(ValueError, match="batch_size >= 1"):
            function(model, params, rows, batch_size=0)
    with pytest.raises(ValueError, match="at least one answer token, got none"):
        evaluate.perplexity(model, params, silent)


def test_answer_logps_on_a_mesh_equal_those_of_one_device():
    model, params = tiny.tiny_model(vocab=64)
    rows = {k: np.asarray(v) for k, v in tiny.tiny_batch(10, 12, vocab=64).items()}
    expected, counts = evaluate.answer_logps(model, params, rows, batch_size=4)
    mesh = sharding.make_mesh(data=2, fsdp=2, tensor=2)
    shards = sharding.by_rules(params, mesh, model.rules)
    logps, lengths = evaluate.answer_logps(
        model, jax.device_put(params, shards), rows, batch_size=4, mesh=mesh
    )
    np.testing.assert_allclose(logps, expected, rtol=1e-5)
    np.testing.assert_array_equal(lengths, counts)


@pytest.mark.slow
def test_completions_on_a_mesh_equal_those_of_one_device(tokenizer, monkeypatch):
    model, params = tiny.tiny_model(vocab=VOCAB)
    settings = dict(max_new_tokens=5, batch_size=4)
    run = partial(evaluate.completions, model, tokenizer=tokenizer, prompts=PROMPTS)
    expected = run(params, **settings)
    mesh = sharding.make_mesh(data=2, fsdp=2, tensor=2)
    shards = sharding.by_rules(params, mesh, model.rules)
    placed = jax.device_put(params, shards)
    assert run(placed, mesh=mesh, **settings) == expected
    with pytest.raises(ValueError, match="needs rows that divide|divide"):
        run(placed, mesh=mesh, max_new_tokens=5, batch_size=3)
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    with pytest.raises(ValueError, match="a mesh of one process, got 2"):
        run(placed, mesh=mesh, **settings)


def test_caches_are_sharded_over_the_mesh():
    model, _ = tiny.tiny_model()
    mesh = sharding.make_mesh(data=2, fsdp=2, tensor=2)
    with jax.set_mesh(mesh):
        cache = jax.jit(model.init_cache, static_argnums=(0, 1))(8, 16)
    for leaf in (*cache["keys"], *cache["values"]):
        assert leaf.shape == (8, 2, 16, 4)
        assert leaf.addressable_shards[0].data.shape == (2, 1, 16, 4)
