# SPDX-License-Identifier: Apache-2.0
"""Bi-level problems whose levels have different variables.

    min over x of F(x, y*(x)),  y*(x) = argmin over y of G(x, y)

x is what is learnt about unlearning (weights of examples, a trade-off, a mask) and y
the parameters that are trained. Where both levels share their variables, `combine.blur`
and `combine.penalty` are the tools. Everything is a pure function of trees, to be
called under jit, on one device or with x and y in shards.

| form | derivatives | beyond K inner gradients | error |
| --- | --- | --- | --- |
| `f2sa` | first | K more, and 3 | O(1 / strength) |
| `pbgd`, `bome` | first | 3 | both levels move together |
| `implicit_cg` | products with the Hessian | 1 a product | that of the solve |
| `implicit_neumann` | products with the Hessian | 1 a term | (1 - rate mu)^terms |
| `unrolled` | through the loop | 3 K, and K copies of y | none, for those K steps |

None of them is well posed where G has no minimum in y, as with plain gradient ascent on
the forget set: take a bounded loss (npo, flatten) or add a pull towards the start.
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
