# SPDX-License-Identifier: Apache-2.0
"""Table and plot of LLM Surgery in the small world, from its lines."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxunlearn.io import log

Line = Mapping[str, Any]

SETS = ("unlearn", "update", "retain")
PUBLISHED = 0.2  # accuracy on the update set that the paper gains


def write(lines: Sequence[Line], about: Mapping[str, Any], place: Path) -> None:
    """`place`.json with every line, `place`.md with the table, `place`.png.

    Args:
        lines: of surgery.run.
        about: head, parameters, command and versions.
        place: path without suffix.
    """
    place.parent.mkdir(parents=True, exist_ok=True)
    rows = summarise(lines)
    whole = {"about": about, "summary": rows, "runs": list(lines)}
    text = json.dumps(log.plain(whole), indent=1)
    place.with_suffix(".json").write_text(text + "\n", encoding="utf-8")
    text = "\n".join(_markdown(rows, about, place.name)) + "\n"
    place.with_suffix(".md").write_text(text, encoding="utf-8")
    _plot(rows, place.with_suffix(".png"))


def summarise(lines: Sequence[Line]) -> list[dict[str, Any]]:
    """For every method, at the rate that ran on most seeds or else the best of the
    sweep: accuracy on each set, [mean, deviation over seeds], and whether the paper's
    three claims hold for the means."""
    before = next(x["accuracy"] for x in lines if x["method"] == "before")
    found = []
    for name in dict.fromkeys(line["method"] for line in lines):
        own = [line for line in lines if line["method"] == name]
        rates = {line.get("rate") for line in own}
        seeds = {rate: [x for x in own if x.get("rate") == rate] for rate in rates}

        def value(rate, seeds=seeds):
            first = seeds[rate][0]["accuracy"]
            gain = first["update"] + first["retain"] - first["unlearn"]
            return len(seeds[rate]), gain, -(rate or 0)

        rate = max(rates, key=value)
        scores = [line["accuracy"] for line in seeds[rate]]
        row = {"method": name, "rate": rate, "seeds": len(scores)}
        row |= {
            s: [float(f([x[s] for x in scores])) for f in (np.mean, np.std)]
            for s in SETS
        }
        row["finite"] = all(line.get("finite", True) for line in seeds[rate])
        row["claims"] = {
            "unlearn": before["unlearn"] - row["unlearn"][0],
            "update": row["update"][0] - before["update"],
            "retain": row["retain"][0] - before["retain"],
        }
        found.append(row)
    return found


def _markdown(rows, about, name) -> list[str]:
    seeds = max(row["seeds"] for row in rows)
    out = [
        "# LLM Surgery in the small world",
        "",
        f"Written by `{about['command']}` (see there for what runs). A decoder of "
        f"{about['parameters'] / 1e6:.2f}M parameters, world `{about['world']}`; "
        f"{about['steps']} steps of {about['rows']} rows of each stream, {seeds} "
        f"seed{'s' if seeds > 1 else ''}; rates "
        f"{', '.join(f'{r:g}' for r in about['rates'])} on the first. Accuracy on "
        f"multiple-choice questions of three options, at most {about['asked']} of each "
        "set; chance is 0.333. Mean ± standard deviation over seeds.",
        "",
        f"![Accuracy on the three sets]({name}.png)",
        "",
        "| method | rate | seeds | unlearn | update | retain |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for row in rows:
        cells = [f"{row[s][0]:.3f} ± {row[s][1]:.3f}" for s in SETS]
        rate = "" if row["rate"] is None else f"{row['rate']:g}"
        mark = "" if row["finite"] else " (ended early: not finite)"
        out.append(
            f"| {row['method']}{mark} | {rate} | {row['seeds']} | {' | '.join(cells)} |"
        )
    out += ["", "## The paper's three claims", ""]
    for row in rows:
        if row["rate"] is None:
            continue
        claims = row["claims"]
        rise = "is reached" if claims["update"] >= PUBLISHED else "is not reached"
        out.append(
            f"- {row['method']}: unlearn {-claims['unlearn']:+.3f}, update "
            f"{claims['update']:+.3f} (the paper's +{PUBLISHED:g} {rise}), retain "
            f"{claims['retain']:+.3f}."
        )
    versions = ", ".join(f"{key} {x}" for key, x in about["versions"].items())
    return [*out, "", f"Versions: {versions}."]


def _plot(rows, file: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(9, 4.2))
    places, width = np.arange(len(rows)), 0.26
    for index, name in enumerate(SETS):
        mean, spread = np.transpose([row[name] for row in rows])
        axes.bar(
            places + (index - 1) * width,
            mean,
            width,
            yerr=spread,
            label=name,
            capsize=2,
        )
    axes.axhline(1 / 3, color="black", linestyle=":", linewidth=1)
    labels = [row["method"].replace(", ", ",\n") for row in rows]
    axes.set_xticks(places, labels, fontsize=8)
    axes.set_ylabel("accuracy, three options")
    axes.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(file, dpi=120)
    pyplot.close(figure)
