# SPDX-License-Identifier: Apache-2.0
"""Selective pruning (2403.01267) of SmolLM2-135M, Python code against English prose."""
