# SPDX-License-Identifier: Apache-2.0
"""RTT in SmolLM2-135M: where facts and models come from, numbers, and the page."""
