#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Runs the same command in the clone on every worker, all at the same time:
#     all.sh python -m experiments.tpu.hosts --devices 16
# The exit status is not 0 if any worker's was not 0.
set -euo pipefail
source "$(dirname "$0")/common.sh"
if [ "$#" -eq 0 ]; then echo "all.sh needs a command, such as: all.sh python -V" >&2; exit 2; fi

command=$(printf '%q ' "$@")
# exec: the program receives the signals, not a shell around it.
everywhere "cd ~/jaxunlearn && export PATH=\$PWD/.venv/bin:\$PATH && exec $command"
