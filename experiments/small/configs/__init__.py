# SPDX-License-Identifier: Apache-2.0
"""Configs of the small world (experiments/small), one source of facts a file."""
