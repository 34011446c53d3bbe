# SPDX-License-Identifier: Apache-2.0
"""The page, plots and image grids of the comparison on images."""

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from experiments.shared import plot as plots
from experiments.shared.intervals import spread
from experiments.shared.page import Content, head, table
from experiments.vision import claims

Line = Mapping[str, Any]
ACCURACIES = ("retain", "forget", "test")
ATTACKS = ("m1", "m2", "m3", "m4", "m5", "m6")
GAP = (*ACCURACIES, "m1")  # what the distance from the retrained model is made of
OTHER = ("seconds", "offline", "wall", "ratio", "um", "om", "m4_auc", "m4_tpr")
PAPERS = ("condensation", "multi-GAN")
SETTINGS = {"random": "Images at random", "class": "One class"}
DATA = {"fashion_mnist": "Fashion-MNIST", "cifar10_subset": "CIFAR-10"}
WORDS = {"holds": "holds", "fails": "**fails**", "undecided": "is **undecided**"}
CONFIGS = {"fashion_mnist": "fashion", "cifar10_subset": "cifar"}


def summarise(lines: Sequence[Line]) -> list[dict[str, Any]]:
    """For every setting and method: [mean, deviation] over seeds of each number.

    `gap` is the mean of |method - retrained| over GAP, within a seed.
    """
    found = []
    for setting in dict.fromkeys(line["setting"] for line in lines):
        here = [line for line in lines if line["setting"] == setting]
        retrained = {
            line["seed"]: line
            for line in here
            if line["method"] == "retrained" and line["finite"]
        }
        for name in dict.fromkeys(line["method"] for line in here):
            runs = [line for line in here if line["method"] == name]
            good = [line for line in runs if line["finite"]]
            row = {"setting": setting, "method": name, "seeds": len(runs)}
            row["diverged"] = len(runs) - len(good)
            for key in (*ACCURACIES, *ATTACKS, *OTHER):
                values = [line[key] for line in good if line.get(key) is not None]
                if values:
                    row[key] = spread(values)
            gaps = [
                statistics.fmean(abs(line[k] - retrained[line["seed"]][k]) for k in GAP)
                for line in good
                if line["seed"] in retrained
            ]
            if gaps:
                row["gap"] = spread(gaps)
            for line in runs:  # the same on all seeds
                row |= {k: line[k] for k in ("rule", "gan_epochs") if k in line}
            found.append(row)
    return found


def readme(results: Mapping[str, Content]) -> list[str]:
    """README.md."""
    lines = head(
        "Forgetting images",
        claim="Unlearning with condensed data ([2402.00195]"
        "(https://arxiv.org/abs/2402.00195)) and with images that GANs draw "
        "([2407.18467](https://arxiv.org/abs/2407.18467)) is faster than retraining "
        "and nearer to the retrained model than standard methods. Both are "
        "experimental here.",
        command="\n".join(command(name) for name in DATA),
        time="About 20 minutes for Fashion-MNIST and 3 hours for CIFAR-10 in the "
        "methods alone, on two cores, and the attacks in addition.",
        setup="A small network forgets images at random or one class in eleven "
        "ways. Every method runs at one setting of `methods.py`; no setting was tuned. "
        "These are small runs: compare rows with each other, not with the papers' "
        "tables.",
        verdict=[f"{DATA[name]}: {count(results[name])}" for name in _known(results)]
        + [
            "The claims one by one: [condensation](../condensation/README.md), "
            "[multi-GAN](../multi_gan/README.md)."
        ],
    )
    lines += [
        "*retain*, *forget*, *test*: accuracy in percent (test: classes that remain). "
        "*gap*: mean distance, in percentage points, from the retrained model of the "
        "same seed in these three and in M1. M1 to M6: attacks of `attacks.py`; the "
        "ideal is the retrained model's number, not 0.5. UM, OM: gradient metrics. "
        "*s*: CPU seconds of all cores for the steps, without compilation (SSD's with "
        "it). *before*: CPU seconds of condensing, of training the GANs or of SalUn's "
        "mask, compilation included. *wall*: seconds by the clock for the complete "
        "method, on two cores that other work used too (condensing counts in the "
        "setting that ran it). Numbers are means over seeds ± standard deviation.",
        "",
    ]
    for name in _known(results):
        lines += _section(name, results[name])
    return lines


def _known(results) -> list[str]:
    return [name for name in DATA if name in results]


def command(name: str) -> str:
    """What runs a data set."""
    return (
        "python -m experiments.vision.run "
        f"--config experiments/vision/configs/{CONFIGS[name]}.py"
    )


def count(content: Content) -> str:
    """How many of the papers' claims hold."""
    each = [x for name in PAPERS for x in tested(content, name)]
    verdicts = [x.verdict for x in each]
    return (
        f"of {len(each)} claims of the two papers {verdicts.count('holds')} hold on "
        f"every seed, {verdicts.count('fails')} fail on every seed, and "
        f"{verdicts.count('undecided')} are undecided."
    )


def tested(content: Content, method: str) -> list[claims.Tested]:
    """The claims about a method, tested on the means and on every seed."""
    runs = content["runs"]
    seeds = [
        summarise([line for line in runs if line["seed"] == seed])
        for seed in dict.fromkeys(line["seed"] for line in runs)
    ]
    return claims.tested(content["methods"], seeds, method)


def _section(name: str, content: Content) -> list[str]:
    config, rows = content["about"]["config"], content["methods"]
    lines = [
        f"## {DATA[name]}",
        "",
        f"{config['train'] * 10} training and {config['test'] * 10} test images, a "
        f"{config['family']} of {config['width']:g} times the paper's width, "
        f"{config['epochs']} epochs; methods that train further have "
        f"{config['tune_epochs']}. Seeds {', '.join(map(str, config['seeds']))}; jax "
        f"{content['about']['jax']} on {content['about']['device']}.",
        "",
        f"![Accuracies and time](results/{name}.png)",
        "",
        " ".join(_settings(rows, config)),
        "",
    ]
    if config["pictures"]:
        lines += [f"![Condensed and drawn images](results/{name}_pictures.png)", ""]
    for setting in dict.fromkeys(row["setting"] for row in rows):
        here = [row for row in rows if row["setting"] == setting]
        lines += [f"### {DATA[name]}: {SETTINGS[setting].lower()}", "", *rows_of(here)]
        reduced = next((r["ratio"][0] for r in here if "ratio" in r), None)
        if reduced is not None:
            lines += [
                f"The reduced retain set has {reduced:.2f} times the rows of the "
                "retain set.",
                "",
            ]
    return [*lines, *answers(rows), ""]


def rows_of(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """The table of some methods."""
    header = ["method", "seeds", *ACCURACIES, "gap", *map(str.upper, ATTACKS)]
    header += ["UM", "OM", "s", "before", "wall"]
    body = []
    for row in rows:
        cells = [row["method"], _seeds(row)]
        cells += [cell(row, key, 100, 1) for key in (*ACCURACIES, "gap")]
        cells += [cell(row, key, 1, 2) for key in ATTACKS]
        cells += [cell(row, "um", 1, 0), cell(row, "om", 1, 2)]
        cells += [cell(row, key, 1, 1) for key in ("seconds", "offline", "wall")]
        body.append(cells)
    return table(header, body)


def _seeds(row) -> str:
    diverged = f" ({row['diverged']} diverged)" if row["diverged"] else ""
    return f"{row['seeds']}{diverged}"


def cell(row: Mapping[str, Any], key: str, scale: float, digits: int) -> str:
    """mean ± deviation, the mean alone for one seed, nothing where it is missing."""
    if key not in row:
        return ""
    mean, deviation = row[key]
    text = f"{scale * mean:.{digits}f}"
    single = row["seeds"] - row["diverged"] < 2
    return text if single else f"{text} ± {scale * deviation:.{digits}f}"


def _settings(rows, config) -> list[str]:
    """Settings that are smaller than the papers'."""
    found = [
        f"Condensation: one image for {config['bucket_size']}, by fast distribution "
        f"matching; no offline stage; {config['rounds']} rounds and threshold "
        f"{config['threshold']} (released: 30 and 25)."
    ]
    gan = next((row for row in rows if "gan_epochs" in row), None)
    if gan:
        epochs = gan["gan_epochs"]
        found.append(
            f"Multi-GAN: {config['gan_steps']} steps of {config['gan_batch']} images, "
            f"{epochs['forget']:.2g} epochs of the forget set and "
            f"{epochs['retain']:.2g} epochs of the retain set (images at random; the "
            f"paper does not give a number); forget labels replaced by the rule "
            f"`{gan['rule']}`. *Without images* is the same finetuning without drawn "
            "images."
        )
    return found


def answers(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """For every setting: the nearest methods, and how the papers' methods compare."""
    found = []
    for setting in dict.fromkeys(row["setting"] for row in rows):
        here = {r["method"]: r for r in rows if r["setting"] == setting and "gap" in r}
        if not {"original", "retrained"} <= here.keys():
            continue
        others = [r for n, r in here.items() if n not in ("original", "retrained")]
        near = sorted(others, key=lambda row: row["gap"][0])[:3]
        named = ", ".join(f"{r['method']} ({cell(r, 'gap', 100, 1)})" for r in near)
        if near:
            found.append(
                f"- {SETTINGS[setting]}: nearest to the retrained model by the gap are "
                f"{named}; the original has {cell(here['original'], 'gap', 100, 1)}."
            )
        found += [_compared(setting, here, name) for name in PAPERS if name in here]
    return found


def _compared(setting, here, name) -> str:
    row, original, retrained = here[name], here["original"], here["retrained"]
    closer = original["gap"][0] - row["gap"][0]
    place = "as near to the retrained model as the original, within the deviation"
    if abs(closer) > max(row["gap"][1], original["gap"][1]):
        place = f"{'nearer' if closer > 0 else 'farther'} than the original"
    left = row["forget"][0] - retrained["forget"][0]
    total, reference = row["seconds"][0] + row["offline"][0], retrained["seconds"][0]
    return (
        f"- {SETTINGS[setting]}, {name}: {place}; forget accuracy is "
        f"{abs(100 * left):.1f} points {'above' if left > 0 else 'below'} the "
        f"retrained model's. Its steps take {row['seconds'][0] / reference:.2f} times "
        f"the CPU seconds of retraining, {total / reference:.2f} times with "
        "preparation."
    )


def paper_page(
    results: Mapping[str, Content], method: str, names: Sequence[str]
) -> list[str]:
    """The claims about one method and the rows of some methods, for every data set."""
    lines = []
    for name in _known(results):
        rows = results[name]["methods"]
        lines += [f"## {DATA[name]}: the paper's claims", ""]
        lines += table(
            ["setting", "claim", "here"],
            [
                (SETTINGS[x.setting], f"{method} {x.claim}", x.cell)
                for x in tested(results[name], method)
            ],
        )
        for setting in dict.fromkeys(row["setting"] for row in rows):
            here = [row for row in rows if row["setting"] == setting]
            here = [row for row in here if row["method"] in names]
            lines += [f"{SETTINGS[setting]}, {DATA[name]}:", "", *rows_of(here)]
    plot = [
        f"![{DATA[name]}](../vision/results/{name}.png)" for name in _known(results)
    ]
    return [*lines, *plot, ""]


def paper_verdict(results: Mapping[str, Content], method: str) -> list[str]:
    """One sentence a data set and setting: what becomes of each claim on the method."""
    found = []
    for name in _known(results):
        each = tested(results[name], method)
        for setting in dict.fromkeys(x.setting for x in each):
            here = [x for x in each if x.setting == setting]
            words = [
                f"{word} for {', '.join(x.name for x in here if x.verdict == verdict)}"
                for verdict, word in WORDS.items()
                if any(x.verdict == verdict for x in here)
            ]
            title = f"{DATA[name]}, {SETTINGS[setting].lower()}"
            found.append(f"{title}: {'; '.join(words)}.")
    return found


def draw(content: Content, file: Path) -> None:
    """Accuracies, and CPU seconds, of every method."""
    rows = content["methods"]
    settings = list(dict.fromkeys(row["setting"] for row in rows))
    size = (11, 4 * len(settings))
    with plots.saved(file, size=size, rows=len(settings), columns=2, dpi=90) as (
        _,
        grid,
    ):
        for (left, right), setting in zip(grid, settings, strict=True):
            here = [r for r in rows if r["setting"] == setting and "test" in r]
            names = [row["method"] for row in here]
            series = {k: [100 * np.array(r[k]) for r in here] for k in ACCURACIES}
            plots.bars(left, names, series, rotation=40)
            left.set_ylabel("accuracy, percent")
            left.set_ylim(0, 125)  # room for the legend
            left.set_title(SETTINGS[setting])
            seconds = [row["seconds"][0] for row in here]
            offline = [row["offline"][0] for row in here]
            right.bar(names, seconds, label="forgetting")
            right.bar(names, offline, bottom=seconds, label="before")
            right.set_ylabel("CPU seconds")
            right.tick_params(axis="x", rotation=40, labelsize=8)
            for axis in (left, right):
                axis.legend(fontsize=8)


PLOTS = dict.fromkeys(DATA, draw)


def pictures(shared: Mapping[str, Any], file: Path) -> None:
    """A grid of condensed images and of images that the generators drew."""
    rows = {}
    if "condensed" in shared:
        small = shared["condensed"][0].table
        labels = small["tokens"][:, 1]
        first = [np.flatnonzero(labels == c)[:2] for c in np.unique(labels)]
        rows["condensed, two a class"] = small["image"][np.concatenate(first)]
    for name, drawn in shared.get("drawn", {}).items():
        rows[f"drawn, {name} set"] = drawn[:20]
    if not rows:
        return
    size = (10, 1.6 * len(rows))
    with plots.saved(file, size=size, rows=len(rows), dpi=80) as (_, grid):
        for axis, (name, image) in zip(grid[:, 0], rows.items(), strict=True):
            half = len(image) // 2
            strips = (image[:half], image[half : 2 * half])
            wide = np.concatenate([np.concatenate(list(x), axis=1) for x in strips])
            axis.imshow(np.clip(wide.squeeze(), 0, 1), cmap="gray")
            axis.set_title(name, fontsize=8)
            axis.axis("off")
