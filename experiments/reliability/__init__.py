# SPDX-License-Identifier: Apache-2.0
"""The kill test: runs that are killed at random moments end with the same bits."""
