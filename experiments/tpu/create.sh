#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Queues a request for TPU VMs and waits until they are active. SPOT=0 requests machines
# that are not taken away; SLICES=2 requests two slices of the same type.
set -euo pipefail
source "$(dirname "$0")/common.sh"
: "${TYPE:?is needed: the accelerator type of one slice, such as v6e-16}"
: "${RUNTIME:?is needed: the runtime version, such as v2-alpha-tpuv6e}"

request=(--accelerator-type="$TYPE" --runtime-version="$RUNTIME")
if [ "$SLICES" -gt 1 ]; then
  request+=(--node-count="$SLICES" --node-prefix="$NAME")
else
  request+=(--node-id="$NAME")
fi
if [ "${SPOT:-1}" = 1 ]; then request+=(--spot); fi
gcloud compute tpus queued-resources create "$NAME" --zone="$ZONE" "${request[@]}"

while true; do
  now=$(state)
  echo "$NAME is ${now:-not known yet}"
  case "$now" in
    ACTIVE) exit 0 ;;
    FAILED | SUSPENDING | SUSPENDED) exit 1 ;;
  esac
  sleep 60
done
