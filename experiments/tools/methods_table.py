# SPDX-License-Identifier: Apache-2.0
"""Writes docs/methods.md, the table of every recipe, from the code.

    python -m experiments.tools.methods_table

Names, defaults and costs are read from the recipes: from their signatures, and from the
terms that they make for a tiny decoder. The equation and the source of a recipe are in
FACTS; a recipe without them is an error.
"""

import argparse
import inspect
import sys
from pathlib import Path

from jaxunlearn import models, recipes, terms

PAGE = Path(__file__).parents[2] / "docs" / "methods.md"

NPO = "2/b log(1 + (p/p_ref)^b)"
RMU = "mean (h - c u)^2"
OPEN = "2506.12618"  # OpenUnlearning, whose defaults those recipes take
FACTS = {  # recipe -> (what it descends, arXiv numbers)
    "blur.npo": (
        f"g_r + (gamma - <g_r, g_f>/\\|g_f\\|^2) g_f, f: {NPO}",
        "2506.08164",
    ),
    "blur.graddiff": ("the same, f: log p", "2506.08164"),
    "blur.rmu": (f"the same, f: {RMU}, r: mean (h - h_ref)^2", "2506.08164"),
    "finetune.nll": ("-log p", "maximum likelihood"),
    "mrp.graddiff": (
        "log p + alpha NLL_r, over directions W, h -> h - (h Q^T) Q, Q spans W",
        "2508.15449",
    ),
    "openunlearning.ascent": ("log p", "2210.01504"),
    "openunlearning.graddiff": ("gamma log p + alpha NLL_r", "2203.12817"),
    "openunlearning.npo": (f"gamma {NPO} + alpha NLL_r", "2404.05868"),
    "openunlearning.simnpo": (
        "gamma -2/b log sigma(-b log p/length - delta) + alpha NLL_r",
        "2410.07163",
    ),
    "openunlearning.dpo": (
        "gamma -2/b log sigma(b log(p_w/ref_w) - b log(p_l/ref_l)) + alpha NLL_r",
        "2305.18290",
    ),
    "openunlearning.idkdpo": ("`dpo` towards refusals", "2401.06121"),
    "openunlearning.altpo": ("`dpo` towards made-up answers", "2409.13474"),
    "openunlearning.undial": ("CE(softmax(z_ref - b e_y), p)", "2402.10052"),
    "openunlearning.ce_u": ("CE(softmax(z without y), p)", "2503.01224"),
    "openunlearning.wga": ("gamma p^b log p + alpha NLL_r", "2502.19301"),
    "openunlearning.satimp": (
        "gamma p^b1 (1 - p)^b2 log p + alpha NLL_r",
        "2505.11953",
    ),
    "openunlearning.incorrect": ("gamma NLL_alternate + alpha NLL_r", "2401.06121"),
    "openunlearning.pdu": (
        "gamma (max z - mean z)^2 + mu NLL_r, mu rises while NLL_r > epsilon",
        "2506.05314",
    ),
    "openunlearning.rmu": (f"gamma {RMU} + alpha mean (h - h_ref)^2", "2403.03218"),
    "openunlearning.task_vector": ("-log p, then subtracted", "2212.04089"),
    "rmu.wmdp": (f"{RMU} + alpha mean (h - h_ref)^2", "2403.03218"),
    "surgery.weighted": ("log p_f + NLL_update + KL(ref, p)_r", "2409.13054"),
    "surgery.bilevel": (
        "the same, forgetting as lower level (BLUR)",
        "2409.13054, 2506.08164",
    ),
    "sure.npo": (f"{NPO} + alpha KL(ref, p)_r, on salient rows", "2410.16454"),
    "sure.graddiff": ("log p + alpha NLL_r, on salient rows", "2410.16454"),
}
_HEAD = f"""\
# Methods

Written by `python -m experiments.tools.methods_table` from `jaxunlearn.recipes`; a test
compares it with the code.

p is the probability of an answer or token under the model, p_ref under the reference, z
are logits, h hidden states, g_f and g_r the gradients of forget and retain, NLL_r that
of the retain streams. Numbers under *source* are arXiv's; defaults of `openunlearning`
are that project's ({OPEN}).

*passes*: number of forward and backward passes over the batch of a stream, summed over
streams, and the layer at which they stop. *ref*: forward passes of the reference model
in every step, or "column" where its log-probabilities are computed once and stored as a
column of the rows. *trees*: number of gradient trees in memory. Measured times and
memory:
[results](../experiments/benchmarks/results/methods_cost.md).

| recipe | descends | source | streams | passes | ref | trees | defaults |
| --- | --- | --- | --- | --- | --- | --- | --- |
"""


def page() -> str:
    """The text of docs/methods.md.

    Raises:
        KeyError: if the recipes and the keys of FACTS differ.
    """
    found = recipes.by_name()
    if wrong := sorted(found.keys() ^ FACTS.keys()):
        raise KeyError(
            f"methods_table needs FACTS for exactly the recipes there are, got a "
            f"difference in {wrong}. Add or remove the row."
        )
    config = models.DecoderConfig(
        family="llama",
        vocab=64,
        width=8,
        layers=8,
        heads=2,
        kv_heads=2,
        head_dim=4,
        hidden=8,
        positions=16,
    )
    model = models.make(config)
    return _HEAD + "".join(_row(name, found[name], model) for name in FACTS)


def _row(name: str, function, model) -> str:
    recipe = function(model)
    parts = [part for term in recipe.terms.values() for part in _parts(term)]
    streams = dict.fromkeys(s for part in parts for s in part.reads)
    passes = sum(len(part.reads) for part in parts)
    until = {part.layer for part in parts if part.layer is not None}
    ref = sum(len(part.reads) for part in parts if part.needs_ref)
    column = any("ref_logps" in part.columns for part in parts)
    cells = (
        f"`{name}`",
        *FACTS[name],
        ", ".join(streams),
        f"{passes}" + (f", to layer {max(until)}" if until else ""),
        ", ".join([f"{ref}"] * bool(ref) + ["column"] * column) or "no",
        f"{len(recipe.terms)}",
        ", ".join(_defaults(function)),
    )
    return "| " + " | ".join(cells) + " |\n"


def _parts(term) -> list:
    if isinstance(term, terms.JointTerm):
        return [part for _, _, part in term.parts]
    return [term]


def _defaults(function) -> list[str]:
    """The settings of the method, without those that are None and stream names."""
    return [
        f"{key} {value.default:g}"
        if isinstance(value.default, float)
        else f"{key} {value.default}"
        for key, value in inspect.signature(function).parameters.items()
        if isinstance(value.default, (int, float, str, tuple))
        if key not in ("seed", "weight_decay") and value.default != r".*"
    ]


def main(argv: list[str] | None = None) -> None:
    """Writes the page."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.parse_args(argv)
    PAGE.write_text(page(), encoding="utf-8")
    print(f"Wrote {PAGE.name}", file=sys.stderr)


if __name__ == "__main__":
    main()
