# SPDX-License-Identifier: Apache-2.0
"""Families of golden cases: (case, arrays by role) to outputs by role."""
