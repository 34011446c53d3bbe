# SPDX-License-Identifier: Apache-2.0
"""Benchmarks of time, memory and agreement; timed code runs in a separate process."""
