# SPDX-License-Identifier: Apache-2.0
"""Experimental: two questions about hypergradients (jaxunlearn.bilevel)."""
