# SPDX-License-Identifier: Apache-2.0
"""A term on the load of the experts of a mixture."""

from jaxunlearn.terms import _routing
from jaxunlearn.terms._bound import BoundTerm
from jaxunlearn.typing import Model


def load_balance(model: Model, stream: str) -> BoundTerm:
    """The load-balancing loss of a mixture of experts, Eq. 4 of Fedus et al. 2021.

    E * sum over e of f_e * P_e over the real tokens of the stream in all layers: f_e is
    the number of tokens that expert e computes divided by the number of tokens, and P_e
    the mean probability of expert e. With k experts for each token it is k if the
    probabilities are uniform, and larger if the router prefers some experts. Only P has
    a gradient.

        parts = {"retain": retain, "balance": terms.load_balance(model, "retain")}
        terms.joint(parts, {"retain": 1.0, "balance": 0.001})  # one forward pass

    Args:
        model: a decoder with experts.
        stream: name of the stream to read.
    Returns:
        A Term whose value is the loss. With microbatches it is the mean of their
        losses, weighted by their real tokens.
    Raises:
        ValueError: if the model has no experts.
    Paper and code: the paper chooses one expert for each token. With k experts f adds
        up to k, as in transformers' load_balancing_loss_func.
    References: https://arxiv.org/abs/2101.03961
    """
    if getattr(model.config, "experts", None) is None:
        raise ValueError(
            "load_balance needs a model with experts, got config.experts=None. Leave "
            "the term out."
        )

    def of_routing(routing, batches):
        return _routing.balance(routing, batches), {}

    def score(params, hidden, batches, ref_params):
        raise AssertionError("of_routing takes the place of score")

    columns = ("tokens", "mask")
    return BoundTerm(model, (stream,), score, columns, of_routing=of_routing)
