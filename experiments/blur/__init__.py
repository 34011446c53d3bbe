# SPDX-License-Identifier: Apache-2.0
"""BLUR (2506.08164): its page, drawn from the comparison and the benchmarks of cost."""
