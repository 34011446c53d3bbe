# SPDX-License-Identifier: Apache-2.0
"""Config files for the commands of jaxunlearn, one experiment in each file."""
