# SPDX-License-Identifier: Apache-2.0
"""Benchmarks of time, memory and agreement; what is timed runs in a separate process."""
