# SPDX-License-Identifier: Apache-2.0
"""Machine unlearning with several GANs (2407.18467): the method and its page."""
