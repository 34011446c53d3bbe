# SPDX-License-Identifier: Apache-2.0
"""Tables and plot of the comparison in the small world, from its lines."""

import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from experiments.small import methods
from jaxunlearn.io import log

Line = Mapping[str, Any]

COLUMNS = ("forget_probability", "forget_nll", "retain_probability", "utility")
LEVELS = (0.25, 0.5, 0.75)  # of the twin's forget_nll: where pairs are compared


def write(lines: Sequence[Line], about: Mapping[str, Any], place: Path) -> None:
    """`place`.json with every line, `place`.md with tables, `place`.png with the plot.

    Args:
        lines: of compare.compare.
        about: the comparison's head, rates, seeds and parameters.
        place: path without suffix.
    """
    place.parent.mkdir(parents=True, exist_ok=True)
    rows = summarise(lines, about)
    pairs = equal_forgetting(lines, about)
    whole = {"about": about, "methods": rows, "pairs": pairs, "runs": list(lines)}
    text = json.dumps(log.plain(whole), indent=1)
    place.with_suffix(".json").write_text(text + "\n", encoding="utf-8")
    text = _markdown(lines, about, rows, pairs, place.name)
    place.with_suffix(".md").write_text(text, encoding="utf-8")
    _plot(lines, rows, place.with_suffix(".png"))


def summarise(lines: Sequence[Line], about: Mapping[str, Any]) -> list[dict[str, Any]]:
    """For every method, at its published and at its best rate: mean and deviation.

    The best of about["rates"] is chosen on the first seed. A setting that has not run
    on every seed says so in `seeds`.
    """
    twin = next(x["forget_nll"] for x in lines if x["method"] == "twin")
    runs = [line for line in lines if "rate" in line]
    found = []
    for name in dict.fromkeys(line["method"] for line in runs):
        own = [line for line in runs if line["method"] == name]
        published = next((r["rate"] for r in own if r["published"]), None)
        first = {r["rate"]: r for r in own if r["seed"] == about["seeds"][0]}
        swept = [first[rate] for rate in about["rates"] if rate in first]
        complete = len(swept) == len(about["rates"])
        best = max(swept, key=lambda line: balance(line, twin)) if complete else {}
        for setting, rate in (
            ("published", published),
            ("best of sweep", best.get("rate")),
        ):
            at = [r for r in own if r["rate"] == rate]
            if rate is not None and at:
                found.append(
                    {"method": name, "setting": setting, "rate": rate}
                    | {"seeds": len(at), "diverged": sum(not r["finite"] for r in at)}
                    | {column: _spread([r[column] for r in at]) for column in COLUMNS}
                    | {"log10_forget_quality": _spread([log_quality(r) for r in at])}
                )
    return found


def balance(line: Line, twin_nll: float) -> float:
    """Harmonic mean of utility and nearness to the twin, in [0, 1]: what "best" means.

    Nearness is forget_nll over the twin's, or the inverse if that is smaller: 0 where
    nothing is forgotten, 1 at the twin, less again for who says nothing at all.
    """
    ratio = max(line["forget_nll"], 1e-9) / twin_nll
    near = min(ratio, 1.0 / ratio)
    total = near + line["utility"]
    return 2.0 * near * line["utility"] / total if total else 0.0


def log_quality(line: Line) -> float:
    """log10 of forget quality; 0 at the twin."""
    return float(np.log10(max(line["forget_quality"], 1e-30)))


def equal_forgetting(
    lines: Sequence[Line], about: Mapping[str, Any]
) -> list[dict[str, Any]]:
    """BLUR's utility minus its weighted sum's, where both have forgotten as much.

    For each seed, the utility of a method is a curve over the mean negative
    log-probability of the forgotten answers, through the untouched model and its runs
    at every rate; it is read, by straight lines, at parts of what the twin has.

    Returns:
        For each pair and level: the difference, mean and deviation over seeds, and the
        larger deviation of the two methods' own utilities there. Levels that a curve
        does not reach, or pairs whose seeds are not complete, are left out.
    """
    base = {line["method"]: line for line in lines if "rate" not in line}
    found = []
    for plain, blur in methods.SUMS.items():
        for level in LEVELS:
            target = level * base["twin"]["forget_nll"]
            sides = [
                [
                    _at(_curve(lines, base["untouched"], name, seed, about), target)
                    for seed in about["seeds"]
                ]
                for name in (blur, plain)
            ]
            if any(value is None for side in sides for value in side):
                continue
            gaps = [b - p for b, p in zip(*sides, strict=True)]
            spread = max(statistics.stdev(side) for side in sides)
            found.append(
                {"blur": blur, "sum": plain, "level": level, "forget_nll": target}
                | {"utility_blur": _spread(sides[0]), "utility_sum": _spread(sides[1])}
                | {"gap": _spread(gaps), "seed_spread": spread}
                | {"beyond_spread": abs(statistics.mean(gaps)) > spread}
            )
    return found


def _curve(lines, untouched, name, seed, about):
    runs = [
        line
        for line in lines
        if line["method"] == name
        and line.get("seed") == seed
        and line["finite"]
        and line["rate"] in about["rates"]
    ]
    if len(runs) < len(about["rates"]):
        return None
    runs = sorted([untouched, *runs], key=lambda line: line["forget_nll"])
    return [line["forget_nll"] for line in runs], [line["utility"] for line in runs]


def _at(curve, target) -> float | None:
    if curve is None or not curve[0][0] <= target <= curve[0][-1]:
        return None
    return float(np.interp(target, *curve))


def _spread(values: Sequence[float]) -> list[float]:
    """[mean, standard deviation]; the deviation of one value is 0."""
    sd = statistics.stdev(values) if len(values) > 1 else 0.0
    return [statistics.mean(values), sd]


def _markdown(lines, about, rows, pairs, name) -> str:
    base = {line["method"]: line for line in lines if "rate" not in line}
    out = [
        "# Every method in the small world",
        "",
        "Written by `python -m experiments.comparison.run` (see there for what runs).",
        f"A decoder of {about['parameters'] / 1e6:.2f}M parameters, world "
        f"`{about['world']}`; {about['steps']} steps of {about['rows']} rows of each "
        f"stream, rates {', '.join(f'{r:g}' for r in about['rates'])}, seeds "
        f"{', '.join(map(str, about['seeds']))}. Mean ± standard deviation over seeds.",
        "Forget quality is the p-value of TOFU's test against the retrained twin, as "
        "its log10: 0 is indistinguishable. Utility is the harmonic mean of "
        "probability, greedy match and truth ratio over rows to keep.",
        "",
        f"![Forget quality against utility]({name}.png)",
        "",
        "| method | setting | rate | seeds | log10 forget quality | forget probability "
        "| retain probability | utility |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for key, label in (("twin", "retrained twin"), ("untouched", "untouched")):
        line = base[key]
        out.append(
            f"| **{label}** | | | | {log_quality(line):.1f} | "
            f"{line['forget_probability']:.3f} | {line['retain_probability']:.3f} | "
            f"{line['utility']:.3f} |"
        )
    for row in rows:
        bad = f" ({row['diverged']} diverged)" if row["diverged"] else ""
        out.append(
            f"| {row['method']} | {row['setting']} | {row['rate']:g} | "
            f"{row['seeds']}{bad} | {_pm(row['log10_forget_quality'], 1)} | "
            f"{_pm(row['forget_probability'])} | {_pm(row['retain_probability'])} | "
            f"{_pm(row['utility'])} |"
        )
    out += ["", "## BLUR against the weighted sum of the same two losses", ""]
    out += [
        "Same terms, same AdamW, same rates and seeds; only the combiner differs. "
        "Utility at equal forgetting: where the negative log-probability of forgotten "
        "answers is a part of the twin's, read off each seed's curve over the rates.",
        "",
        "| pair | part of the twin's | utility of BLUR | of the sum | BLUR ahead by "
        "(paired) | larger seed deviation | beyond it |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for pair in pairs:
        out.append(
            f"| {pair['blur']} / {pair['sum']} | {pair['level']:.0%} | "
            f"{_pm(pair['utility_blur'])} | {_pm(pair['utility_sum'])} | "
            f"{_pm(pair['gap'], sign='+')} | {pair['seed_spread']:.3f} | "
            f"{'yes' if pair['beyond_spread'] else 'no'} |"
        )
    out += ["", *_said(pairs)]
    return "\n".join(out) + "\n"


def _said(pairs) -> list[str]:
    """In plain words, who is ahead at each level."""
    said = []
    for pair in pairs:
        gap, sd = pair["gap"]
        side = "ahead of" if gap > 0 else "behind"
        much = "more" if pair["beyond_spread"] else "no more"
        said.append(
            f"- At {pair['level']:.0%} of the twin's loss, `{pair['blur']}` is {side} "
            f"`{pair['sum']}` by {abs(gap):.3f} of utility (± {sd:.3f}), {much} than "
            f"the seeds' own spread of {pair['seed_spread']:.3f}."
        )
    return said or ["No pair has run at every rate on every seed yet."]


def _pm(spread: Sequence[float], digits: int = 3, sign: str = "") -> str:
    return f"{spread[0]:{sign}.{digits}f} ± {spread[1]:.{digits}f}"


def _plot(lines, rows, file: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(9, 6))
    names = list(dict.fromkeys(row["method"] for row in rows))
    looks = {name: (f"C{i % 10}", "osD^v"[i // 10 % 5]) for i, name in enumerate(names)}
    for row in rows:
        quality, utility = row["log10_forget_quality"], row["utility"]
        best = row["setting"] != "published"
        axes.errorbar(
            utility[0],
            quality[0],
            xerr=utility[1],
            yerr=quality[1],
            fmt=looks[row["method"]][1] if best else "x",
            color=looks[row["method"]][0],
            label=row["method"] if best else None,
            capsize=2,
        )
    for line in lines:
        if "rate" not in line:
            marker = "*" if line["method"] == "twin" else "s"
            label = "retrained twin" if line["method"] == "twin" else "untouched"
            axes.scatter(
                line["utility"],
                log_quality(line),
                marker=marker,
                s=160,
                color="black",
                label=label,
                zorder=3,
            )
    axes.set_xlabel("utility over rows to keep (right is better)")
    axes.set_ylabel("log10 forget quality (up is better)")
    axes.set_title(
        "Small world: filled marks at the best rate of the sweep, "
        "crosses at the published rate"
    )
    axes.legend(fontsize=8, ncol=2)
    axes.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(file, dpi=120)
    pyplot.close(figure)
