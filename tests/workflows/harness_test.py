# SPDX-License-Identifier: Apache-2.0
"""lm-evaluation-harness with our decoder, on local tasks; skipped where absent."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
from numpy.testing import assert_allclose

lm_eval = pytest.importorskip("lm_eval", reason="needs the extra `harness`")

from lm_eval import tasks as lm_eval_tasks  # noqa: E402

from experiments.benchmarks import harness as benchmark  # noqa: E402
from jaxunlearn import evaluate, metrics  # noqa: E402
from jaxunlearn._generate import generate  # noqa: E402
from jaxunlearn.data import table  # noqa: E402
from jaxunlearn.io import hf  # noqa: E402
from jaxunlearn.workflows import harness  # noqa: E402
from tests import chat_templates, tiny  # noqa: E402
from tests.workflows.invented_questions import rows  # noqa: E402


@pytest.fixture(autouse=True)
def offline(monkeypatch, tmp_path):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("LM_HARNESS_CACHE_PATH", str(tmp_path / "cache"))


@pytest.fixture
def decoder(made):
    return harness.Decoder(*made, batch_size=4)


def choices(count=8):
    """Four-way questions of different lengths."""
    return [
        {
            "subject": f"s{i % 3}",
            "question": "Which " + "city " * (i % 4) + f"is {i}?",
            "choices": [f"Town {i + j}" for j in range(4)],
            "answer": i % 4,
        }
        for i in range(count)
    ]


def request(*args):
    return SimpleNamespace(args=args)


def test_log_probabilities_are_those_of_our_scoring(made, decoder):
    model, params, tokenizer = made
    questions = [row["question"] for row in rows("f")]
    answers = [row["answer"] for row in rows("f")]
    pairs = zip(questions, answers, strict=True)
    found = decoder.loglikelihood(
        [request(q, f" {a}") for q, a in pairs], disable_tqdm=True
    )
    encoded = table.encode(tokenizer, questions, answers)
    wanted, _ = evaluate.answer_logps(model, params, encoded)
    assert_allclose([logp for logp, _ in found], wanted, rtol=1e-4)
    assert not any(greedy for _, greedy in found)


def test_continuations_of_greedy_decoding_are_marked(made, decoder):
    model, params, tokenizer = made
    ids = tokenizer.encode("The city")
    batch = {"tokens": np.asarray([ids]), "mask": np.ones((1, len(ids)), bool)}
    new = np.asarray(generate(model, params, batch, max_new_tokens=3))[0].tolist()
    other = [*new[:2], (new[2] + 1) % len(tokenizer)]
    found = decoder._loglikelihood_tokens(
        [(("", ""), ids, new), (("", ""), ids, other), (("", ""), ids, new[:1])]
    )
    assert [greedy for _, greedy in found] == [True, False, True]


def test_every_token_of_a_rolling_text_is_scored_with_any_windows(made, decoder):
    model, params, tokenizer = made
    short, long = "The city is here.", "The river flows to the sea. " * 40
    assert len(tokenizer.encode(long)) > 2 * model.config.max_length
    found = decoder.loglikelihood_rolling([request(short), request(long), request("")])
    ids = tokenizer.encode(short)
    whole = np.asarray([[tokenizer.bos_token_id, *ids]], np.int32)
    mask = np.ones_like(whole, bool)
    batch = {"tokens": whole, "mask": mask, "answer": mask}
    wanted = evaluate.token_scores(model, params, batch).logps.sum()
    assert_allclose(found[0], wanted, rtol=1e-4)
    assert found[1] < found[0] < 0 and found[2] == 0.0


def test_answers_are_generated_greedily_up_to_a_stop_word(made, decoder):
    model, params, tokenizer = made
    prompts = ["The capital", "A river flows to", "Kenya"]
    free = {"until": [], "max_gen_toks": 6}
    got = decoder.generate_until([request(x, free) for x in prompts])
    wanted = evaluate.completions(model, params, tokenizer, prompts, max_new_tokens=6)
    assert got == [text.strip() for text in wanted]
    stop = next(x for text in wanted for x in text if x.strip())
    stopped = {"until": stop, "max_gen_toks": 6, "do_sample": False}
    got = decoder.generate_until([request(x, stopped) for x in prompts])
    assert got == [metrics.truncate_at_stop(text, [stop]) for text in wanted]
    with pytest.raises(ValueError, match="decodes greedily, but the task asks"):
        decoder.generate_until([request("x", {"do_sample": True})])


CHAT = [
    {"role": "system", "content": "Be."},
    {"role": "user", "content": "Where?"},
]


def chatting(family, **more):
    tokenizer = chat_templates.tokenizer(chat_templates.FAMILIES[family])
    model, params = tiny.tiny_model(vocab=len(tokenizer), positions=512, layers=1)
    return harness.Decoder(model, params, tokenizer, batch_size=4, **more)


def test_conversations_are_written_as_the_template_writes_them():
    llama = chatting("Llama 2")
    text = llama.apply_chat_template(CHAT)
    # The separator of the template follows, which the harness does not write.
    assert text == "<s>[INST] <<SYS>>\nBe.\n<</SYS>>\n\nWhere? [/INST] "
    (row,) = table.render(llama.tokenizer, [CHAT], ["Paris."], harness.CHAT)
    before, after = llama._encode_pair(text, "Paris.")
    assert before == llama.tok_encode(row.prompt)
    assert before + after == llama.tok_encode(row.prompt + row.separator + row.answer)
    ids = llama.tok_encode(text)
    assert ids.count(llama.tokenizer.bos_token_id) == 1
    assert llama.tok_encode("Where?")[0] == llama.tokenizer.bos_token_id
    begun = [*CHAT, {"role": "assistant", "content": "In"}]
    assert llama.apply_chat_template(begun, add_generation_prompt=False).endswith(" In")
    gemma = chatting("Gemma")
    with pytest.warns(UserWarning, match="System role not supported"):
        text = gemma.apply_chat_template(CHAT)
    assert text.startswith("<s><start_of_turn>user\nWhere?")
    dated = table.PromptFormat(chat=True, arguments={"date_string": "5 May"})
    dated = chatting("ChatML, Qwen 2", prompt_format=dated)
    dated.tokenizer.chat_template = "{{ date_string }}" + dated.tokenizer.chat_template
    assert dated.apply_chat_template(CHAT).startswith("5 May<|im_start|>system")
    names = {x.tokenizer_name for x in (llama, gemma, dated)}
    assert len(names) == 3  # their cached requests differ


def test_the_prompt_format_is_that_of_the_training(monkeypatch):
    template = (
        "{{ date }}{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}"
        "{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"
    )
    chat = table.PromptFormat(
        prompt="Q: {question}",
        chat=True,
        system="Be brief.",
        template=template,
        arguments={"date": "5 May"},
        separator="\n",
        end="\n\n",
    )
    decoder, seen = chatting("Gemma", prompt_format=chat), []
    assert decoder.chat_template(True) == template
    text = decoder.apply_chat_template(CHAT[1:])
    (row,) = table.render(decoder.tokenizer, ["Where?"], ["Paris."], chat)
    assert text == row.prompt + row.separator
    assert text == "5 May[system]Be brief.[user]Q: Where?[assistant]\n"
    assert decoder.apply_chat_template(CHAT).startswith("5 May[system]Be.[user]Q: ")
    begun = [*CHAT, {"role": "assistant", "content": "In"}]
    begun = decoder.apply_chat_template(begun, add_generation_prompt=False)
    assert begun == "5 May[system]Be.[user]Q: Where?[assistant]In"

    def completions(model, params, tokenizer, prompts, **_):
        seen.extend(prompts)
        return ["\nParis.\n\nQ: And?"] * len(prompts)

    monkeypatch.setattr(evaluate, "completions", completions)
    stops = {"until": ["", "?"], "max_gen_toks": 2}  # the empty one says nothing
    got = decoder.generate_until([request(x, stops) for x in (text, "plain\n")])
    assert got == ["Paris.", "Paris.\n\nQ: And"]  # a task's own text has no such end
    assert seen == [row.prompt, "plain\n"]
    other = chatting("Gemma").tokenizer_name
    assert decoder.tokenizer_name != other
    with pytest.raises(ValueError, match="chat=True"):
        chatting("Gemma", prompt_format=table.PLAIN)


def test_only_the_template_writes_the_begin_token_of_a_conversation(monkeypatch):
    """The tokenizer adds one to other texts; a template of Phi-3's form writes none."""
    phi, given = chatting("Phi-3"), {}
    backend = phi.tokenizer.backend_tokenizer
    backend.post_processor = tiny.tiny_tokenizer(
        template="<s> $A"
    ).backend_tokenizer.post_processor
    text = phi.apply_chat_template(CHAT[1:])
    trained = table.encode(
        phi.tokenizer, ["Where?"], ["Paris."], prompt_format=harness.CHAT
    )
    ids = trained["tokens"][0][trained["mask"][0]].tolist()
    before, after = phi._encode_pair(text, "Paris.")
    assert before + after == ids[: len(before + after)]
    assert phi.tok_encode("Where?")[0] == phi.tokenizer.bos_token_id

    def generate(model, params, batch, **more):
        given["tokens"] = batch["tokens"][0][batch["mask"][0]].tolist()
        return np.zeros((len(batch["tokens"]), 1), int)

    monkeypatch.setattr(evaluate, "generate", generate)
    phi.generate_until([request(text, {"until": [], "max_gen_toks": 1})])
    assert given["tokens"] == phi.tok_encode(text) == ids[: len(given["tokens"])]
    phi.generate_until([request("Where?", {"until": [], "max_gen_toks": 1})])
    assert given["tokens"] == phi.tok_encode("Where?")


def test_a_turn_ends_where_the_template_ends_it(monkeypatch):
    gemma, given = chatting("Gemma"), {}
    monkeypatch.setattr(
        evaluate, "completions", lambda *x, **more: given.update(more) or ["a"]
    )
    text = gemma.apply_chat_template(CHAT[1:])
    gemma.generate_until([request(text, {"until": [], "max_gen_toks": 2})])
    end = gemma.tokenizer.convert_tokens_to_ids("<end_of_turn>")
    assert given["eos_ids"] == [gemma.eot_token_id, end]


def test_contexts_and_lists_may_be_empty(decoder):
    model, params, tokenizer = decoder._model, decoder._params, decoder.tokenizer
    assert decoder.loglikelihood([]) == [] and decoder.generate_until([]) == []
    stop = {"until": [], "max_gen_toks": 3}
    (got,) = decoder.generate_until([request("", stop)])
    wanted = evaluate.completions(model, params, tokenizer, ["<s>"], max_new_tokens=3)
    assert got == wanted[0].strip()
    found = decoder.loglikelihood([request("", "Paris"), request("<s>", "Paris")])
    assert_allclose(found[0][0], found[1][0], rtol=1e-5)


def test_a_task_of_an_instruct_model(tmp_path):
    benchmark.write_task(choices(2), tmp_path, ["texts"])
    decoder = chatting("Llama 3")
    found = lm_eval.simple_evaluate(
        decoder,
        tasks=["local_texts"],
        task_manager=lm_eval_tasks.TaskManager(
            include_path=str(tmp_path), include_defaults=False
        ),
        num_fewshot=1,
        apply_chat_template=True,
        system_instruction="Be.",
        fewshot_as_multiturn=True,
        bootstrap_iters=0,
    )
    (sample, *_) = found["samples"]["local_texts"]
    context, choice = sample["arguments"][0]
    turns = context.split("<|start_header_id|>")[1:]
    roles = [turn.split("<|end_header_id|>")[0] for turn in turns]
    assert roles == ["system", "user", "assistant", "user", "assistant"]
    ids = decoder.tok_encode(context)
    assert ids[0] == decoder.tokenizer.bos_token_id and ids.count(ids[0]) == 1
    (wanted, _), *_ = decoder.loglikelihood([request(context, choice)])
    assert_allclose(sample["filtered_resps"][0][0], wanted, rtol=1e-5)


def test_texts_over_the_positions_are_counted_and_refused(made, decoder):
    longest = made[0].config.max_length
    long = (("", ""), [5] * longest, [7, 7])
    fits = (("", ""), [5] * (longest - 1), [7])
    assert len(decoder._loglikelihood_tokens([fits])) == 1
    message = (
        f"at most {longest} tokens, but 2 of 3 are longer, the longest {longest + 2}"
    )
    with pytest.raises(ValueError, match=message):
        decoder._loglikelihood_tokens([long, fits, long])
    with pytest.raises(ValueError, match="batch_size"):
        harness.Decoder(*made, batch_size=0)


@pytest.mark.slow
def test_a_local_task_gives_the_accuracy_of_choose(made, tmp_path):
    model, params, tokenizer = made
    found = choices()
    benchmark.write_task(found, tmp_path)
    hf.save(model, params, tmp_path / "model", tokenizer=tokenizer)
    ways = {
        "ours": benchmark.in_harness("jaxunlearn", tmp_path / "model", tmp_path),
        "choose": {
            form: benchmark.picks(model, params, tokenizer, found, form)
            for form in benchmark.FORMS
        },
    }
    try:
        import torch  # noqa: F401

        ways["hf"] = benchmark.in_harness("hf", tmp_path / "model", tmp_path)
    except ImportError:
        pass
    result = benchmark.compare(found, ways)
    for way in ways:
        assert result["picked_otherwise"][way] == {"letters": 0, "texts": 0}, way
    assert result["most_apart"] == 0 and result["met"]


def test_questions_are_spread_and_accuracies_counted():
    assert [row["answer"] for row in benchmark.spread(choices(8), 4)] == [0, 2, 0, 2]
    with pytest.raises(ValueError, match="1 to 8 questions, got count=9"):
        benchmark.spread(choices(8), 9)
    rows = [{"question": "x" * n, "choices": ["a", "bc"]} for n in (4, 5, 3)]
    assert benchmark.short(rows, 7) == [rows[0], rows[2]]
    found = choices(4)
    right = [row["answer"] for row in found]
    ways = {"a": dict.fromkeys(benchmark.FORMS, right)}
    ways["b"] = {"letters": [0, 0, 0, 0], "texts": right}
    result = benchmark.compare(found, ways)
    assert result["right"] == {
        "a": {"letters": 4, "texts": 4},
        "b": {"letters": 1, "texts": 4},
    }
    assert result["picked_otherwise"]["b"] == {"letters": 3, "texts": 0}
    assert result["most_apart"] == 3 and not result["met"]
    about = {"seconds": dict(a=1.0, b=2.0), "questions": 4, "subjects": 3}
    about |= {"versions": {}, "command": "x"}
    text = "\n".join(benchmark.in_words(json.loads(json.dumps(result | about))))
    assert "| b | 1 | 0.250 | 3 | 4 | 1.000 | 0 | 2 |" in text and "not met" in text
