# SPDX-License-Identifier: Apache-2.0
"""Configs of experiments/run.py, one experiment a file."""
