# SPDX-License-Identifier: Apache-2.0
"""Configs of the small world (experiments/small): a file for each source of facts."""
