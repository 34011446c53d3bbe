# SPDX-License-Identifier: Apache-2.0
"""Configs of jaxunlearn/workflows/training/run.py, one experiment a file."""
