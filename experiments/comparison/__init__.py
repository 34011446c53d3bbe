# SPDX-License-Identifier: Apache-2.0
"""Every method in the small world, at published rates and after the same sweep."""
