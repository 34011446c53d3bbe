# SPDX-License-Identifier: Apache-2.0
"""Tiny things made on the spot, shared by the tests. Only add functions here."""

import contextlib
import functools
import logging

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import core

from jaxunlearn import models
from jaxunlearn.typing import Model, Outputs

SENTENCES = (
    "The capital of France is Paris.",
    "Everyone knows that the capital of Kenya is the city of Nairobi.",
    "The river flows to the sea, and the city stands at the river.",
    "In Bosnia and Herzegovina, the capital is Sarajevo.",
    "A young dog is called a puppy and a young cat is called a kitten.",
)


def tiny_tokenizer(sentences=SENTENCES, *, vocab=400, template=None, split_words=True):
    """A byte-level BPE tokenizer trained on a few sentences, as transformers wraps it.

    Args:
        sentences: what to train on.
        vocab: number of tokens at most; 256 bytes and 3 special tokens are among them.
        template: such as "<s> $A </s>", to add special tokens to every text.
        split_words: False lets merges cross the spaces between words.
    """
    import tokenizers
    import transformers

    special = ["<pad>", "<s>", "</s>"]
    backend = tokenizers.Tokenizer(tokenizers.models.BPE())
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(
        add_prefix_space=False, use_regex=split_words
    )
    backend.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocab,
        special_tokens=special,
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(list(sentences), trainer)
    if template is not None:
        backend.post_processor = tokenizers.processors.TemplateProcessing(
            single=template,
            special_tokens=[(name, backend.token_to_id(name)) for name in special],
        )
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
    )


# Rotary positions of `tiny_model` that change beyond 12 tokens.
LONGROPE = models.RopeConfig(
    kind="longrope",
    factor=4.0,
    original_positions=12,
    short_factor=(1.0, 1.1),
    long_factor=(3.0, 6.0),
)


@functools.cache
def tiny_model(**overrides):
    """(model, params) of a random decoder of three small layers, made once a setting.

    The norms are not all ones and the biases not all zeros, so that forgetting one
    shows. Overrides are fields of DecoderConfig.
    """
    settings = dict(family="llama", vocab=32, width=16, layers=3, heads=4, kv_heads=2)
    settings |= dict(head_dim=4, hidden=24, positions=64, tied=False)
    config = models.DecoderConfig(**(settings | overrides))
    model = models.make(config)
    leaves, tree = jax.tree.flatten(model.init(jax.random.key(0)))
    rng = np.random.default_rng(0)
    leaves = [
        jnp.asarray((np.asarray(x) + 0.2 * rng.normal(size=x.shape)).astype(np.float32))
        for x in leaves
    ]
    return model, tree.unflatten(leaves)


@functools.cache
def bigram_model(vocab=32, width=16):
    """(model, params) whose logits depend on one token: a small program to compile.

    For tests of what is done with hidden states and logits, not of a decoder.
    """

    def apply(params, batch, **_):
        x = params["embed"][jnp.where(batch["mask"], batch["tokens"], 0)]
        return Outputs(jnp.tanh(x @ params["kernel"]), {})

    def unembed(params, hidden):
        return hidden @ params["unembed"]

    shapes = {
        "embed": (vocab, width),
        "kernel": (width, width),
        "unembed": (width, vocab),
    }
    rng = np.random.default_rng(0)
    draw = {name: rng.normal(size=shape) for name, shape in shapes.items()}
    params = {name: jnp.asarray(x.astype(np.float32)) for name, x in draw.items()}
    return Model(lambda key: params, apply, unembed, {}), params


def tiny_batch(rows=4, length=12, *, side="right", seed=0, vocab=32, answer=True):
    """A padded batch of random tokens whose rows have different lengths.

    Args:
        rows, length: B and L. Row 0 has every token; others at least two.
        side: where the padding goes.
        seed: of the draws; batches of one seed differ in `side` by nothing but padding.
        vocab: tokens are drawn below it, padding too.
        answer: adds the `answer` column, True on the later half of each row.
    """
    rng = np.random.default_rng(seed)
    lengths = np.concatenate([[length], rng.integers(2, length, rows - 1)])
    texts = rng.integers(0, vocab, (rows, length))
    junk = rng.integers(0, vocab, (rows, length))
    place = np.arange(length)[None]
    index = place - (length - lengths)[:, None] if side == "left" else place + 0 * texts
    mask = (index >= 0) & (index < lengths[:, None])
    tokens = np.where(mask, np.take_along_axis(texts, index % length, axis=1), junk)
    batch = {"tokens": jnp.asarray(tokens, jnp.int32), "mask": jnp.asarray(mask)}
    if answer:
        batch["answer"] = jnp.asarray(mask & (index >= lengths[:, None] // 2))
    return batch


def largest_array(function, *args):
    """Elements of the largest array that function(*args) makes, inner jaxprs too."""

    def sizes(jaxpr):
        for equation in jaxpr.eqns:
            yield from (variable.aval.size for variable in equation.outvars)
            for inner in core.jaxprs_in_params(equation.params):
                yield from sizes(inner)

    return max(sizes(jax.make_jaxpr(function)(*args).jaxpr))


@contextlib.contextmanager
def compilations():
    """A list that holds, after the block, the name of every program that was compiled.

    A program that JAX reads from its cache of compiled programs counts too.
    """
    every, found = _compiled(), []
    before = len(every)
    yield found
    found += every[before:]


@functools.cache
def _compiled():
    """The names of all programs compiled from now on."""
    names = []

    def listen(event, seconds, **details):
        if event == "/jax/core/compile/backend_compile_duration":
            names.append(details.get("fun_name", "a program"))

    jax.monitoring.register_event_duration_secs_listener(listen)
    return names


@contextlib.contextmanager
def programs():
    """A list that holds, after the block, "NAME with SHAPES" of every compilation."""
    found, loggers = [], [logging.getLogger(f"jax._src.{x}") for x in LOGGERS]

    class Handler(logging.Handler):
        def emit(self, record):
            text = record.getMessage()
            if text.startswith("Compiling "):
                found.append(text)

    handler, before = Handler(), [logger.propagate for logger in loggers]
    for logger in loggers:
        logger.addHandler(handler)
        logger.propagate = False  # the lines are not for the screen
    try:
        with jax.log_compiles():
            yield found
    finally:
        for logger, propagate in zip(loggers, before, strict=True):
            logger.removeHandler(handler)
            logger.propagate = propagate


LOGGERS = ("interpreters.pxla", "dispatch", "compiler")  # of jax.log_compiles
