#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Runs the same command in the clone on every worker, all at once:
#     all.sh python -m experiments.tpu.hosts --devices 16
# Ends with a status that is not 0 where any worker's did.
set -euo pipefail
source "$(dirname "$0")/common.sh"
if [ "$#" -eq 0 ]; then echo "all.sh needs a command, such as: all.sh python -V" >&2; exit 2; fi

command=$(printf '%q ' "$@")
# exec: the program itself gets the signals, not a shell around it.
everywhere "cd ~/jaxunlearn && export PATH=\$PWD/.venv/bin:\$PATH && exec $command"
