# SPDX-License-Identifier: Apache-2.0
"""How the error of the penalty hypergradient falls with its strength.

    python -m experiments.bilevel.error

Weighted ridge regression has a hypergradient in closed form. The lower level fits y to
rows weighted by exp(x_i); the upper level is the error on other rows. `bilevel.f2sa`
receives both inner solutions to machine precision, so that only two errors are left:
the bias of the penalty, c / strength, and rounding, strength * eps. Takes seconds.
--draw only draws the page and the plot again.
"""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from experiments.bilevel import figures
from experiments.shared import command, page
from jaxunlearn import bilevel

FOLDER = Path(__file__).resolve().parent
ROWS, WIDTH = 40, 10
STRENGTHS = tuple(10.0**k for k in range(10))


def run(arguments: command.Arguments) -> None:
    """Measures the errors, then writes the results and the page."""
    if arguments.options.draw:
        page.redraw(FOLDER, figures.readme, figures.PLOTS)
        return
    with jax.enable_x64(True):
        errors = {name: errors_in(name) for name in ("float64", "float32")}
    strengths = np.array(STRENGTHS[2:7])
    slope = np.polyfit(np.log(strengths), np.log(errors["float64"][2:7]), 1)[0]
    content = {
        "strengths": STRENGTHS,
        "relative_errors": errors,
        "slope_1e2_to_1e6": float(slope),
        "jax": jax.__version__,
    }
    page.publish(FOLDER, "error", content, figures.readme, figures.draw_error)


def errors_in(dtype: str) -> list[float]:
    """|dx - exact| / |exact| at each of STRENGTHS, everything computed in `dtype`."""
    a, b, c, d, x = problem()
    fitted = np.exp(x)[:, None] * a
    hessian = a.T @ fitted + np.eye(WIDTH)
    solution = np.linalg.solve(hessian, fitted.T @ b)
    pull = np.linalg.solve(hessian, c.T @ (c @ solution - d))
    exact = -np.exp(x) * (a @ solution - b) * (a @ pull)
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
        z = jnp.asarray(solution, dtype)
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


if __name__ == "__main__":
    command.main(run, __doc__, options=figures.DRAW)
