# SPDX-License-Identifier: Apache-2.0
"""What torch does with a family's model: greedy tokens, and a step of unlearning.

A step on eight devices equals that on one. Models whose rotations depend on the length
of a row are compared row by row, since transformers mixes the rows of a batch.
"""

from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxunlearn as ju
from jaxunlearn import combine, losses, sharding, terms, trees
from jaxunlearn.io import hf
from tests.io.families_test import CASES, MIXED, THREE

pytestmark = pytest.mark.slow  # nearly every test compiles a model

BETA, RATE, NEW = 0.1, 0.1, 12
LONG = {
    "original_max_position_embeddings": 16,
    "rope_scaling": {
        "type": "longrope",
        "short_factor": [1.0, 1.1, 1.2, 1.3],
        "long_factor": [3.0, 5.0, 7.0, 9.0],
    },
}
DYNAMIC = {"rope_parameters": {"rope_type": "dynamic", "factor": 3.0}}
MORE = {
    "phi3-longrope": ("phi3", LONG),
    "llama-dynamic": ("llama", DYNAMIC | {"max_position_embeddings": 16}),
    "gemma3": ("gemma3_text", THREE | {"layer_types": MIXED, "sliding_window": 7}),
}
ROW_BY_ROW = ("phi3-longrope", "llama-dynamic")
QUICK = ("olmo", *ROW_BY_ROW)
NEWER = ("olmo", "olmo2", "phi", "phi-normed", "smollm3", "smollm3-windows", "olmo3")
NEWER += ("ministral", "granite", "glm", "glm4", "seed_oss")


def named(names, quick=QUICK):
    return [
        pytest.param(x, marks=[] if x in quick else [pytest.mark.slow]) for x in names
    ]


@pytest.fixture(scope="module")
def loaded(torch_model, tmp_path_factory):
    """case -> (torch model, our model, params)."""

    @cache
    def load(case):
        family, settings = {**CASES, **MORE}[case]
        settings = {n: v for n, v in settings.items() if n != "shards"}
        folder = tmp_path_factory.mktemp(case)
        reference = torch_model(family, **settings)
        reference.save_pretrained(folder)
        model, params, _ = hf.load(folder)
        return reference, model, params

    return load


def prompts(side):
    mask = np.ones((3, 12), bool)
    for row, cut in ((1, 3), (2, 9)):
        mask[row, slice(None, cut) if side == "left" else slice(-cut, None)] = False
    tokens = np.random.default_rng(0).integers(3, 90, mask.shape).astype(np.int32)
    return {"tokens": tokens, "mask": mask}


@pytest.mark.parametrize("case", named([*NEWER, *MORE]))
def test_greedy_tokens_are_those_of_transformers(loaded, case):
    import torch

    reference, model, params = loaded(case)
    batch = prompts("left")
    ours = ju.generate(model, params, batch, max_new_tokens=NEW)
    rows = [slice(i, i + 1) for i in range(3)] if case in ROW_BY_ROW else [slice(3)]
    for row in rows:
        tokens, mask = batch["tokens"][row], batch["mask"][row]
        real = mask.any(axis=0)
        # A model of one row at a time, with the rotations of a fresh one.
        reference(torch.tensor(tokens[:, -1:]))
        theirs = reference.generate(
            torch.tensor(tokens[:, real]),
            attention_mask=torch.tensor(mask[:, real], dtype=torch.long),
            max_new_tokens=NEW,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
        )[:, real.sum() :]
        np.testing.assert_array_equal(ours[row], theirs.numpy())


def streams(rows=4):
    """Padded right, and padded left; the last 5 tokens of a row are its answer."""
    rng, found = np.random.default_rng(1), {}
    for name, side in (("forget", "right"), ("retain", "left")):
        mask = np.ones((rows, 14), bool)
        mask[1, slice(-4, None) if side == "right" else slice(4)] = False
        last = mask.sum(1, keepdims=True) - mask.cumsum(1) < 5
        tokens = rng.integers(3, 90, mask.shape).astype(np.int32)
        found[name] = {"tokens": tokens, "mask": mask, "answer": mask & last}
    shift = np.array([3.0, -8.0, 1.0, 0.0], np.float32)
    found["forget"]["ref_logps"] = -20.0 + shift
    return found


def step(model):
    tx = optax.chain(combine.weighted_sum(), optax.sgd(RATE))
    npo = terms.on_logps(partial(losses.npo, beta=BETA), model, "forget")
    nll = terms.on_logps(losses.nll, model, "retain", reduce="token")
    parts = {"forget": npo, "retain": nll}
    return ju.make_step(parts, tx), partial(ju.init_state, tx=tx)


def torch_step(reference, batches):
    """The params after the same step, as torch's gradient gives it: name -> array."""
    import torch

    def logps(batch):
        tokens = torch.tensor(batch["tokens"], dtype=torch.long)
        mask = batch["mask"]
        logits = reference(
            input_ids=tokens,
            attention_mask=torch.tensor(mask, dtype=torch.long),
            position_ids=torch.tensor(np.maximum(mask.cumsum(1) - 1, 0)),
        ).logits
        each = logits[:, :-1].log_softmax(-1).gather(-1, tokens[:, 1:, None])[..., 0]
        return each * torch.tensor(batch["answer"][:, 1:])

    ratio = logps(batches["forget"]).sum(1) - torch.tensor(
        batches["forget"]["ref_logps"]
    )
    npo = -2 / BETA * torch.nn.functional.logsigmoid(-BETA * ratio).mean()
    answers = batches["retain"]["answer"][:, 1:].sum()
    loss = npo - logps(batches["retain"]).sum() / int(answers)
    names, weights = zip(*reference.named_parameters(), strict=True)
    grads = torch.autograd.grad(loss, weights)
    return {
        name: (weight - RATE * grad).detach().numpy()
        for name, weight, grad in zip(names, weights, grads, strict=True)
    }


@pytest.mark.parametrize("case", named([*NEWER, "gemma3"], ("phi",)))
def test_a_step_of_npo_is_that_of_torch(loaded, case, tmp_path):
    reference, model, params = loaded(case)
    batches = streams()
    expected = torch_step(reference, batches)
    take, start = step(model)
    state = start(params, key=jax.random.key(0))
    state, _ = jax.jit(take)(state, batches, ju.Frozen())
    hf.save(model, state.params, tmp_path)
    ours = type(reference).from_pretrained(tmp_path).state_dict()
    before = reference.state_dict()
    for name, values in expected.items():
        np.testing.assert_allclose(ours[name].numpy(), values, atol=1e-4, err_msg=name)
        if not name.endswith("k_proj.bias"):  # softmax cancels one without rotation
            assert not np.array_equal(values, before[name].numpy()), name


@pytest.mark.slow
@pytest.mark.parametrize("case", [*NEWER, "gemma3"])
def test_a_step_on_eight_devices_is_that_on_one(loaded, case):
    _, model, params = loaded(case)
    take, start = step(model)
    batches = jax.tree.map(jnp.asarray, streams())
    start = partial(start, key=jax.random.key(0))
    expected, _ = jax.jit(take)(start(params), batches, ju.Frozen())
    mesh = sharding.make_mesh(fsdp=4, tensor=2)
    shards = sharding.by_rules(params, mesh, model.rules)
    placed = jax.device_put(params, shards)
    for path, leaf in trees.paths(placed).items():
        split = path.endswith(("kernel", "embedding"))
        assert leaf.sharding.is_fully_replicated != split or "bias" in path, path
    state = sharding.create(start, mesh, model.rules, placed)
    jitted = sharding.jit_step(take, mesh, model.rules, state)
    state, _ = jitted(state, batches, ju.Frozen())
    jax.tree.map(
        partial(np.testing.assert_allclose, rtol=0, atol=2e-5),
        state.params,
        expected.params,
    )
