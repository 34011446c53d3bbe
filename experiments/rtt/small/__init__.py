# SPDX-License-Identifier: Apache-2.0
"""RTT in the small world: where facts and models come from, numbers, and the page."""
