# SPDX-License-Identifier: Apache-2.0
"""The quickstart: SmolLM2-135M forgets the capitals of Europe and is then attacked."""
