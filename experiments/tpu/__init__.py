# SPDX-License-Identifier: Apache-2.0
"""Notes and scripts for cloud TPUs: README.md, which also lists what was checked."""
