# SPDX-License-Identifier: Apache-2.0
"""Attacks: edits made by an adversary, to see whether the forgetting is real."""

from jaxunlearn.attacks._relearn import relearn as relearn
