# SPDX-License-Identifier: Apache-2.0
"""Benchmarks: one module each, with a `read` that returns the rows of one table."""
