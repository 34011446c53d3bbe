# SPDX-License-Identifier: Apache-2.0
"""Readers of your own files: `files` (by file ending), `jsonl`, `prose`."""
