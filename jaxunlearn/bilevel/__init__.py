# SPDX-License-Identifier: Apache-2.0
"""Bi-level problems whose two levels have different variables.

Experimental: names and behaviour may change in any release.

    min over x of F(x, y*(x)),  y*(x) = argmin over y of G(x, y)

x is an upper-level variable, such as weights of examples, a trade-off or a mask, and y
is the parameters that are trained. If both levels have the same variables, use
`combine.blur` or `combine.penalty`. All functions are pure functions of trees; call
them under jit, with x and y on one device or sharded.

| function | derivatives | cost beyond K inner gradients | error |
| --- | --- | --- | --- |
| `f2sa` | first order | K more, and 3 | O(1 / strength) |
| `pbgd`, `bome` | first order | 3 | both levels are updated together |
| `implicit_cg` | Hessian-vector products | 1 product per iteration | of the solve |
| `implicit_neumann` | Hessian products | 1 per term | (1 - step_size mu)^num_terms |
| `unrolled` | through the loop | 3 K, and K copies of y | none, for those K steps |

No method is well posed if G has no minimum in y, as for plain gradient ascent on the
forget set. Use a bounded loss (`losses.npo`, `losses.logit_margin`), or add a penalty
on the distance to the initial y.
"""

from jaxunlearn.bilevel._common import Direction as Direction
from jaxunlearn.bilevel._common import Hypergradient as Hypergradient
from jaxunlearn.bilevel._common import solve as solve
from jaxunlearn.bilevel._implicit import gauss_newton as gauss_newton
from jaxunlearn.bilevel._implicit import hessian_product as hessian_product
from jaxunlearn.bilevel._implicit import implicit_cg as implicit_cg
from jaxunlearn.bilevel._implicit import implicit_neumann as implicit_neumann
from jaxunlearn.bilevel._penalty import bome as bome
from jaxunlearn.bilevel._penalty import f2sa as f2sa
from jaxunlearn.bilevel._penalty import pbgd as pbgd
from jaxunlearn.bilevel._unrolled import unrolled as unrolled
from jaxunlearn.bilevel._unrolled import unrolled_steps as unrolled_steps
