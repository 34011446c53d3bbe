# SPDX-License-Identifier: Apache-2.0
"""How the error of the penalty hypergradient falls with its strength.

    python -m experiments.bilevel.error

On weighted ridge regression, whose hypergradient is known in closed form: the lower
level fits y to rows weighted by exp(x_i), the upper level is the error on other rows.
`bilevel.f2sa` is given both inner solutions to machine precision, so that what is left
is the bias of the penalty, c / strength, and rounding, strength * eps. Writes
results/bilevel_error.json, .md and .png; a few seconds.
"""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from jaxunlearn import bilevel

ROWS, WIDTH = 40, 10
STRENGTHS = tuple(10.0**k for k in range(10))
RESULTS = Path(__file__).resolve().parent / "results" / "error"


def main() -> dict:
    """Measures, writes and returns the errors."""
    with jax.enable_x64(True):
        errors = {name: errors_in(name) for name in ("float64", "float32")}
    strengths = np.array(STRENGTHS[2:7])
    slope = np.polyfit(np.log(strengths), np.log(errors["float64"][2:7]), 1)[0]
    found = {
        "strengths": STRENGTHS,
        "relative_errors": errors,
        "slope_1e2_to_1e6": float(slope),
        "jax": jax.__version__,
    }
    text = json.dumps(found, indent=1) + "\n"
    RESULTS.with_suffix(".json").write_text(text, encoding="utf-8")
    RESULTS.with_suffix(".md").write_text(_markdown(found), encoding="utf-8")
    _plot(found)
    return found


def errors_in(dtype: str) -> list[float]:
    """|dx - exact| / |exact| at each of STRENGTHS, everything computed in `dtype`."""
    a, b, c, d, x = problem()
    fitted = np.exp(x)[:, None] * a
    hessian = a.T @ fitted + np.eye(WIDTH)
    best = np.linalg.solve(hessian, fitted.T @ b)
    pull = np.linalg.solve(hessian, c.T @ (c @ best - d))
    exact = -np.exp(x) * (a @ best - b) * (a @ pull)
    cast = {"a": a, "b": b, "c": c, "d": d}
    cast = {name: jnp.asarray(value, dtype) for name, value in cast.items()}

    def upper(x, y):
        del x
        return 0.5 * jnp.sum((cast["c"] @ y - cast["d"]) ** 2)

    def lower(x, y):
        error = cast["a"] @ y - cast["b"]
        return 0.5 * (jnp.sum(jnp.exp(x) * error**2) + jnp.sum(y**2))

    errors = []
    for strength in STRENGTHS:
        # The minimiser of F / strength + G, in closed form and in float64.
        both = hessian + c.T @ c / strength
        y = np.linalg.solve(both, fitted.T @ b + c.T @ d / strength)
        given = (jnp.asarray(each, dtype) for each in (x, y))
        z = jnp.asarray(best, dtype)
        dx = bilevel.f2sa(upper, lower, *given, strength=strength, z=z).dx
        wide = np.asarray(dx, np.float64)
        errors.append(float(np.linalg.norm(wide - exact) / np.linalg.norm(exact)))
    return errors


def problem() -> tuple[np.ndarray, ...]:
    """Rows and targets of both levels, and log-weights of the lower level's rows."""
    rng = np.random.default_rng(0)
    a, c = (rng.normal(size=(ROWS, WIDTH)) / 2 for _ in range(2))
    b, d = (rng.normal(size=ROWS) for _ in range(2))
    return a, b, c, d, 0.5 * rng.normal(size=ROWS)


def _markdown(found):
    rows = zip(found["strengths"], *found["relative_errors"].values(), strict=True)
    lines = [
        "# The penalty hypergradient's error",
        "",
        "Written by `python -m experiments.bilevel.error`: weighted ridge regression, "
        "inner problems solved exactly, |dx - exact| / |exact|.",
        "",
        "![Error against strength](bilevel_error.png)",
        "",
        f"Slope of log error over log strength from 1e2 to 1e6 in float64: "
        f"{found['slope_1e2_to_1e6']:.3f} (O(1 / strength) is -1).",
        "",
        "| strength | float64 | float32 |",
        "| --- | --- | --- |",
    ]
    lines += [f"| {s:.0e} | {wide:.1e} | {narrow:.1e} |" for s, wide, narrow in rows]
    return "\n".join(lines) + "\n"


def _plot(found):
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 5))
    strengths, errors = found["strengths"], found["relative_errors"]
    for name, values in errors.items():
        axes.loglog(strengths, values, marker="o", label=name)
    guide = [errors["float64"][2] * strengths[2] / s for s in strengths]
    axes.loglog(strengths, guide, color="grey", linestyle=":", label="1 / strength")
    axes.set_xlabel("strength of the penalty")
    axes.set_ylabel("relative error of the hypergradient")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.tight_layout()
    figure.savefig(RESULTS.with_suffix(".png"), dpi=120)
    pyplot.close(figure)


if __name__ == "__main__":
    main()
