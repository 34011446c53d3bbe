# SPDX-License-Identifier: Apache-2.0
"""A term on each half of its rows, for combiners that need independent gradients."""

import dataclasses

from jaxunlearn.typing import Metrics, Params, PRNGKey, Streams, Term, Total


@dataclasses.dataclass(frozen=True)
class HalfTerm:
    """A term on every second row of its streams, from `first` (0 or 1) on."""

    whole: Term
    first: int

    @property
    def reads(self) -> tuple[str, ...]:
        return self.whole.reads

    @property
    def needs_ref(self) -> bool:
        return self.whole.needs_ref

    def __call__(
        self, params: Params, streams: Streams, ref: Params | None, key: PRNGKey
    ) -> tuple[Total, Metrics]:
        own = {}
        for name in self.reads:
            rows = len(streams[name]["tokens"])
            if rows % 2:
                raise ValueError(
                    f"terms.halves needs an even number of rows of {name!r} in every "
                    f"microbatch, got {rows}. Change the batch size or microbatch."
                )
            own[name] = {k: x[self.first :: 2] for k, x in streams[name].items()}
        return self.whole(params, own, ref, key)


def halves(term: Term) -> tuple[HalfTerm, HalfTerm]:
    """The term on the even and on the odd rows of its streams.

        a, b = terms.halves(forget)
        parts = {"forget_a": a, "forget_b": b, "retain": retain}
        combine.blur(lower=("forget_a", "forget_b"), gamma=0.1)

    Together they cost what the term does, and each row is in one of them, microbatches
    or not. The mean of their gradients is the term's where both count alike (rows), and
    near it where they do not (tokens).

    Args:
        term: any term.
    Returns:
        Two terms on the same streams.
    Raises:
        ValueError: when run, if a stream has an odd number of rows in a microbatch.
    """
    return HalfTerm(term, 0), HalfTerm(term, 1)
