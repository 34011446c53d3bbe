# SPDX-License-Identifier: Apache-2.0
"""The overview of all benchmarks, from results/*.json.

To draw it again:

    python -m experiments.benchmarks.figures
"""

from collections.abc import Callable, Mapping
from pathlib import Path

from experiments.benchmarks import accelerator
from experiments.shared import command
from experiments.shared.page import Content, redraw, table

FOLDER = Path(__file__).resolve().parent
_PREPARED = (
    "Prepared, and not yet run on a device: [`accelerator`](results/accelerator.md), "
    "correctness, time and memory of 1B to 8B models on one GPU or TPU host."
)


def readme(results: Mapping[str, Content]) -> list[str]:
    """README.md: a row for each benchmark that has a committed result."""
    rows = [
        (
            question,
            f"`python -m experiments.benchmarks.{line}`",
            answer(results[name]),
            link,
        )
        for name, (question, line, answer, link) in BENCHMARKS.items()
        if name in results
    ]
    return [
        "# Benchmarks",
        "",
        "What steps, plans, decoding, scoring and quantization cost, mostly on two CPU "
        "cores. Times are of one machine that other work may have used too; compare "
        "rows with each other. Run a command with `--help` for its options.",
        "",
        *table(["question", "command", "answer", "more"], rows),
        *(() if "accelerator" in results else (_PREPARED, "")),
        "Not in the table: `gguf --output FILE` (size and perplexity of SmolLM2-135M "
        "as GGUF, by scheme; no committed result) and [attention.md]"
        "(results/attention.md) (splash attention planned for TPUs, never run on one), "
        "and [step_before_after.json](results/step_before_after.json) (the float32 "
        "step at commit d09bea9 and after the model families of version 0.2 were "
        "added: the same losses and temporaries, times within their noise). "
        "Plans read the text of compiled programs, which is experimental.",
    ]


def _step(content: Content) -> str:
    ratios, low = content["ratios"], ""
    if "auto" in content:
        low = (
            f'; in {content["auto_dtype"]}, which is `compute_dtype="auto"`, '
            f"{ratios['auto_tokens_per_second_over_float32']:.2f} times the tokens a "
            "second of float32, "
            f"{ratios['auto_tokens_per_second_over_torchs_best']:.2f} times those of "
            "torch's faster dtype (float32 or autocast), and "
            f"{ratios['auto_peak_over_torch_bfloat16']:.2f} times the peak memory of "
            "autocast"
        )
    return (
        f"BLUR {ratios['blur_seconds_over_weighted_sum']:.2f} times the seconds of the "
        f"weighted sum and {ratios['blur_minus_weighted_sum_peak_gb']:.2f} GB more; "
        f"the weighted sum {ratios['tokens_per_second_over_torch']:.2f} times torch's "
        f"tokens a second with {ratios['peak_over_torch']:.2f} times its peak memory"
        f"{low}"
    )


def _methods(content: Content) -> str:
    ratios = {x["method"]: x["time_ratio"] for x in content["methods"]}
    slowest = max(ratios, key=ratios.get)
    return (
        f"at most {ratios[slowest]:.2f} times a plain step of the same tokens "
        f"({slowest}), {len(ratios) - 1} methods"
    )


def _generate(content: Content) -> str:
    return "; ".join(
        f"{name}: {'met' if bar['met'] else '**not met**'} ({bar['got']:.2f}, needed "
        f"{bar['needed']:g})"
        for name, bar in content["bars"].items()
    )


def _harness(content: Content) -> str:
    return (
        f"{content['questions']} questions: right answers differ by at most "
        f"{content['most_apart']} ({'met' if content['met'] else '**not met**'})"
    )


def _cost(content: Content) -> str:
    parts = [
        f"{name} {axis['exponent']:.2f}{'' if axis['met'] else ' (**not met**)'}"
        for name, axis in content["axes"].items()
    ]
    return (
        f"exponents, where 1 is linear and at most {content['limit']:g} is asked: "
        + ", ".join(parts)
    )


def _loop(content: Content) -> str:
    ahead, waits = content["ahead"], content["waits"]
    trace, second = ahead["trace"], content["relearn"]["second"]
    return (
        f"the loop reads the metrics {ahead['reads_per_step']:g} time(s) a step, "
        f"{ahead['reads_without_work_per_step']:g} times while the device has no "
        f"further step to run (the last step only), {waits['reads_per_step']:g} times "
        f"where a hook reads the state; {trace['started_before_the_last_ended']} of "
        f"{trace['of']} steps were started before the one before had ended; the second "
        f"relearn with another rate compiles {second['programs']} programs "
        f"({second['seconds']:.1f} s in place of "
        f"{content['relearn']['first']['seconds']:.1f} s)"
    )


def _quantize(content: Content) -> str:
    parts = []
    for kind in ("int4", "int3"):
        for name, row in content[kind].items():
            unseen = row["unseen"]
            parts.append(
                f"{kind} {name}: {row['seconds']:.0f} s (rounding "
                f"{row['round_seconds']:.1f} s), smaller error on "
                f"{unseen['errs_less']} of {unseen['kernels']} kernels on unseen rows, "
                f"median ratio {unseen['median_error_ratio']:.2f}"
            )
    return "; ".join(parts)


def _plan(content: Content) -> str:
    fits = sum(entry["blur"]["fits"] for entry in content.values())
    return (
        f"{fits} of {len(content)} plans fit the memory of a device; times are lower "
        "bounds, not measurements"
    )


# Result -> (question, command, answer, link).
BENCHMARKS: Mapping[str, tuple[str, str, Callable[[Content], str], str]] = {
    "step_smollm2_cpu": (
        "What do a BLUR step and a step in bfloat16 of SmolLM2-135M cost, next to a "
        "weighted sum and torch?",
        "step --output FILE",
        _step,
        "[JSON](results/step_smollm2_cpu.json)",
    ),
    "cost": (
        "How does the cost of steps, evaluations and attacks grow with the work?",
        "cost --output PREFIX",
        _cost,
        "[plot](results/cost.png), [JSON](results/cost.json)",
    ),
    "loop": (
        "Does the training loop wait for a step, and does an attack compile twice?",
        "loop --output FILE",
        _loop,
        "[JSON](results/loop.json)",
    ),
    "methods_cost": (
        "What does a step of each method cost?",
        "methods",
        _methods,
        "[page](results/methods_cost.md)",
    ),
    "generate_smollm2_cpu": (
        "How fast are generation and scoring, next to transformers?",
        "generate --output PREFIX",
        _generate,
        "[page](results/generate_smollm2_cpu.md)",
    ),
    "harness_mmlu": (
        "Do lm-evaluation-harness and our scoring give the same accuracy on MMLU?",
        "harness --model FOLDER --output PREFIX",
        _harness,
        "[page](results/harness_mmlu.md)",
    ),
    "accelerator": (
        "Are steps right on an accelerator, and what do 1B to 8B models cost there?",
        "accelerator --output PREFIX",
        accelerator.answer,
        "[page](results/accelerator.md)",
    ),
    "quantize": (
        "How long do rounding, GPTQ and AWQ take, and how much do they err?",
        "quantize --output FILE",
        _quantize,
        "[JSON](results/quantize.json)",
    ),
    "plan": (
        "What memory and time do 8B, 70B and 405B models and a mixture of 30B need on "
        "TPUs?",
        "plan_table",
        _plan,
        "[page](results/plan.md)",
    ),
}


if __name__ == "__main__":
    command.main(lambda arguments: redraw(FOLDER, readme, {}), __doc__)
