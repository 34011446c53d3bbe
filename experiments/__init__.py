# SPDX-License-Identifier: Apache-2.0
"""Scripts that run jaxunlearn; nothing imports them."""
