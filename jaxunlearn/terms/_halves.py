# SPDX-License-Identifier: Apache-2.0
"""A term split into two over its rows, for independent estimates of its gradient."""

import dataclasses

from jaxunlearn.typing import Metrics, Params, PRNGKey, Streams, Term, Total


@dataclasses.dataclass(frozen=True)
class HalfTerm:
    """A term on every second row of its streams, beginning at row `first` (0 or 1)."""

    term: Term
    first: int

    @property
    def reads(self) -> tuple[str, ...]:
        return self.term.reads

    @property
    def parts(self) -> tuple:
        """The terms inside, as those of a JointTerm, for Recipe.reads."""
        return getattr(self.term, "parts", ((None, 1.0, self.term),))

    @property
    def needs_ref(self) -> bool:
        return self.term.needs_ref

    def check(self, streams: Streams) -> None:
        """As that of the term, if it has one."""
        if hasattr(self.term, "check"):
            self.term.check(streams)

    def __call__(
        self,
        params: Params,
        streams: Streams,
        ref_params: Params | None,
        key: PRNGKey,
    ) -> tuple[Total, Metrics]:
        batches = {}
        for name in self.reads:
            rows = len(streams[name]["tokens"])
            if rows % 2:
                raise ValueError(
                    f"terms.halves needs an even number of rows of {name!r} in every "
                    f"microbatch, got {rows}. Change the batch size or the number of "
                    "microbatches."
                )
            batches[name] = {k: x[self.first :: 2] for k, x in streams[name].items()}
        return self.term(params, batches, ref_params, key)


def halves(term: Term) -> tuple[HalfTerm, HalfTerm]:
    """The term on the even and on the odd rows of its streams.

        a, b = terms.halves(forget)
        parts = {"forget_a": a, "forget_b": b, "retain": retain}
        combine.blur(lower=("forget_a", "forget_b"), gamma=0.1)

    Together they cost as much as the term, and each row is in one of them, with
    microbatches or without. The mean of their gradients equals the term's gradient
    where both halves count equally (rows), and is close to it where they do not
    (tokens).

    Args:
        term: any term.
    Returns:
        Two terms on the same streams.
    Raises:
        ValueError: when run, if a stream has an odd number of rows in a microbatch.
    """
    return HalfTerm(term, 0), HalfTerm(term, 1)
