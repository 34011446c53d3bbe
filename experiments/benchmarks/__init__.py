# SPDX-License-Identifier: Apache-2.0
"""Benchmarks; each figure is measured in a process of its own."""
