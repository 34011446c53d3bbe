# SPDX-License-Identifier: Apache-2.0
"""Dataset-condensation-driven unlearning (2402.00195): method and experiments."""
