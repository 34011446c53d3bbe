# SPDX-License-Identifier: Apache-2.0
"""Benign finetuning, prompting, sampling, steering, unwrapping and pruning."""

import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal

from jaxunlearn import attacks, edits, evaluate, trees, wrap
from tests import tiny
from tests.attacks.towns import encode_text

pytestmark = pytest.mark.slow  # nearly every test compiles a model


def prompts_of(towns):
    return [prompt for prompt, _ in encode_text(towns)]


@pytest.mark.slow
def test_benign_finetuning_trains_and_refuses_forget_rows(world):
    retain = world.encode(world.retain)
    forget = world.encode(world.trained + world.held_out)
    run = partial(attacks.benign, world.model, world.unlearned)
    after, log = run(retain, forget=forget, steps=8, batch_size=18, learning_rate=1e-3)
    assert len(log) == 8
    moved = jax.tree.map(lambda a, b: bool((a != b).any()), after, world.unlearned)
    assert all(jax.tree.leaves(moved))
    both = {name: np.concatenate([retain[name], x]) for name, x in forget.items()}
    with pytest.raises(ValueError, match="got 72 such rows, the first is row 36"):
        run(both, forget=forget, steps=1)


def test_in_context_prepends_shots_of_other_prompts():
    shots = [(f"q{i}", f"a{i}") for i in range(5)]
    prompts = [*(q for q, _ in shots), "other"]
    texts = attacks.in_context(prompts, prefix="Be open.", shots=shots, num_shots=4)
    for text, prompt in zip(texts, prompts, strict=True):
        first, *shown, last = text.split("\n\n")
        assert (first, last) == ("Be open.", prompt)
        assert len(set(shown)) == 4 and set(shown) <= {f"q{i} a{i}" for i in range(5)}
        assert not any(line.startswith(f"{prompt} ") for line in shown)
    again = attacks.in_context(prompts, prefix="Be open.", shots=shots, num_shots=4)
    assert texts == again
    other = attacks.in_context(prompts, prefix="Be open.", shots=shots, seed=1)
    assert texts != other
    assert attacks.in_context(["x"], prefix="P", separator=" ") == ["P x"]
    with pytest.raises(ValueError, match="got neither"):
        attacks.in_context(prompts)
    with pytest.raises(ValueError, match="num_shots=5 shots .* than 'q0', got 4"):
        attacks.in_context(prompts, shots=shots, num_shots=5)


def test_few_shot_completes_the_texts_of_in_context(world):
    prompts = prompts_of(world.held_out)[:4]
    shots = encode_text(world.retain)[:3]
    how = dict(shots=shots, num_shots=1, separator=" ")
    found = attacks.few_shot(
        world.model, world.unlearned, world.tokenizer, prompts, max_new_tokens=2, **how
    )
    by_hand = evaluate.completions(
        world.model,
        world.unlearned,
        world.tokenizer,
        attacks.in_context(prompts, **how),
        max_new_tokens=2,
    )
    assert found == by_hand and len(found) == 4


def test_samples_leak_what_greedy_decoding_hides(world):
    model, tokenizer = world.model, world.tokenizer
    pairs = encode_text(world.held_out)[:12]
    # Half unlearned: the old answer is rarely the most likely one.
    params = edits.interpolate(world.unlearned, world.original, weight=0.5)
    draw = partial(
        attacks.sample,
        model,
        params,
        tokenizer,
        max_new_tokens=2,
        key=jax.random.key(0),
    )
    found = draw([p for p, _ in pairs], num_samples=64, temperature=2.0, batch_size=100)
    assert [len(each) for each in found] == [64] * 12
    hits = np.array(
        [
            [text.strip().startswith(answer) for text in each]
            for each, (_, answer) in zip(found, pairs, strict=True)
        ]
    )
    leaks = [attacks.leak_at_k(hits, k).mean() for k in (1, 8, 64)]
    greedy = world.accuracy(params, world.held_out[:4])
    assert greedy < leaks[2], leaks
    assert leaks[0] < leaks[1] < leaks[2]
    # With a temperature near 0 it equals greedy decoding.
    cold = draw(["the town of"], num_samples=3, temperature=1e-4)
    greedy = evaluate.completions(
        model, params, tokenizer, ["the town of"], max_new_tokens=2
    )
    assert cold == [greedy * 3]
    with pytest.raises(ValueError, match="temperature > 0"):
        draw(["x"], temperature=0.0)
    with pytest.raises(ValueError, match="at least one prompt"):
        draw([])


def test_leak_at_k_by_hand():
    hits = np.array([[1, 0, 0, 0], [0, 0, 0, 0], [1, 1, 1, 0], [1, 1, 1, 1]], bool)
    assert_allclose(attacks.leak_at_k(hits, 1), [0.25, 0, 0.75, 1])
    assert_allclose(attacks.leak_at_k(hits, 2), [1 - 3 / 6, 0, 1, 1])
    assert_allclose(attacks.leak_at_k(hits, 4), [1, 0, 1, 1])
    with pytest.raises(ValueError, match="at most 4.*Draw more"):
        attacks.leak_at_k(hits, 5)
    with pytest.raises(ValueError, match=re.escape("boolean hits [prompts, samples]")):
        attacks.leak_at_k(hits.astype(float), 1)


def prompts(tokenizer, texts):
    from jaxunlearn.data import table

    return table.encode(tokenizer, texts)


def test_steering_moves_the_forget_mean_to_the_retain_mean(world):
    model, params = world.model, world.unlearned
    retain = prompts(world.tokenizer, prompts_of(world.retain))
    forget = prompts(world.tokenizer, prompts_of(world.held_out))
    move = partial(
        attacks.steer, model, params, forget=forget, retain=retain, layers=[1]
    )

    def last(model, table):
        batch = {name: jnp.asarray(table[name]) for name in ("tokens", "mask")}
        values = model.apply(params, batch, taps={"block": (1,)}).taps["block"][0]
        at = batch["mask"].sum(1) - 1
        return np.asarray(values[np.arange(len(at)), at])

    steered, moved = move(batch_size=7)  # the last batch is not full
    shift = last(model, retain).mean(0) - last(model, forget).mean(0)
    by_hand = last(model, forget) + shift
    # Taps come before edits, so compare the result of the layers that follow.
    batch = {name: jnp.asarray(forget[name]) for name in ("tokens", "mask")}
    edit = {"block": lambda x, layer: jnp.where(layer == 1, x + shift, x)}
    wanted = model.apply(params, batch, edits=edit).hidden
    assert_allclose(steered.apply(moved, batch).hidden, wanted, atol=1e-4)
    assert_allclose(by_hand.mean(0), last(model, retain).mean(0), atol=1e-5)
    unmoved, same = move(strength=0.0)
    assert unmoved == steered  # strengths share compiled programs
    assert_allclose(
        unmoved.apply(same, batch).hidden, model.apply(params, batch).hidden, atol=1e-6
    )
    # Decoding with a cache is steered too.
    texts = evaluate.completions(
        steered,
        moved,
        world.tokenizer,
        prompts_of(world.held_out)[:5],
        max_new_tokens=1,
    )
    ends = np.asarray(forget["mask"].sum(1) - 1)[:5]
    logits = model.unembed(params, wanted[np.arange(5), ends])
    ids = np.asarray(logits.argmax(-1))[:, None]
    assert texts == world.tokenizer.batch_decode(ids, skip_special_tokens=True)
    both = edit | {}
    twice = steered.apply(moved, batch, edits=both).hidden
    edit = {"block": lambda x, layer: jnp.where(layer == 1, x + 2 * shift, x)}
    assert_allclose(twice, model.apply(params, batch, edits=edit).hidden, atol=1e-4)
    # A second direction at the same site is added to the first.
    again, both = attacks.steer(
        steered, moved, forget=forget, retain=forget, layers=[0], strength=3.0
    )
    assert again == steered
    assert_allclose(both["steering"]["block"], moved["steering"]["block"], atol=1e-6)


def test_steering_refuses_what_does_not_exist(world):
    table = prompts(world.tokenizer, ["the town of"])
    move = partial(
        attacks.steer, world.model, world.unlearned, forget=table, retain=table
    )
    with pytest.raises(ValueError, match=r"layers from 0 to 1 at 'block', got \[2\]"):
        move(layers=[2])
    with pytest.raises(ValueError, match="site='blok'.*Did you mean 'block'"):
        move(layers=[0], site="blok")
    with pytest.raises(ValueError, match="finite strength"):
        move(layers=[0], strength=float("nan"))


def test_unwrapping_removes_projections_and_lora():
    base, params = tiny.tiny_model()
    batch = tiny.tiny_batch()
    places = {"mlp_out": (0, 2)}
    projected = wrap.projection(base, places)
    rows = jax.random.normal(jax.random.key(0), (2, 3, base.sites["mlp_out"].units))
    taken = wrap.add_projection(projected, params, {"mlp_out": rows})
    low = wrap.lora(base, pattern=r".*/up/kernel", rank=2)
    added = wrap.add_lora(low, params, jax.random.key(1))
    added = trees.map_with_path(
        lambda p, x: x + 0.3 if p.endswith("lora_b") else x, added
    )
    for model, its_params in ((projected, taken), (low, added)):
        changed = model.apply(its_params, batch).hidden
        inner, plain = attacks.unwrap(model, its_params)
        assert np.abs(changed - base.apply(params, batch).hidden).max() > 0.05
        jax.tree.map(assert_array_equal, plain, params)
        assert inner is base or inner == base
    folded = wrap.fold_projection(projected, taken)
    with pytest.raises(ValueError, match="got neither"):
        attacks.unwrap(base, folded)


def test_pruning_removes_the_units_of_forgotten_questions():
    model, params = tiny.tiny_model()
    forget = [tiny.tiny_batch(seed=1), tiny.tiny_batch(seed=2)]
    retain = [tiny.tiny_batch(seed=3)]
    after = attacks.prune(model, params, forget=forget, retain=retain, fraction=0.25)
    down = after["blocks"]["mlp"]["down"]["kernel"]
    gone = np.asarray((down == 0).all(-1))
    assert gone.sum() == int(0.25 * gone.size)
    from jaxunlearn import stats

    found = [stats.activity(model, params, x)["mlp"].abs for x in (forget, retain)]
    scores = np.asarray(edits.unit_scores(forget=found[0], retain=found[1]))
    assert scores[gone].min() >= scores[~gone].max()
    same = attacks.prune(model, params, forget=forget, retain=retain, fraction=0.0)
    jax.tree.map(assert_array_equal, same, params)
    with pytest.raises(ValueError, match=r"fraction in \[0, 1\]"):
        attacks.prune(model, params, forget=forget, retain=retain, fraction=2.0)
