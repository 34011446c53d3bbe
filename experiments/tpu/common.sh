# SPDX-License-Identifier: Apache-2.0
# Sourced by the other scripts: their settings, and how they reach the machines.
: "${NAME:?is needed: the name of the queued resource}"
: "${ZONE:?is needed: the zone, such as us-east5-b}"
SLICES=${SLICES:-1}

# ACTIVE, SUSPENDED and so on; empty if there is no such queued resource.
state() {
  gcloud compute tpus queued-resources describe "$NAME" --zone="$ZONE" \
    --format='value(state.state)' 2>/dev/null || true
}

# Runs $1 in a shell on every worker of every slice, all at the same time. Without
# --batch-size=all gcloud starts 64 workers and waits for them to end before it starts
# the next ones, while those 64 wait for the others.
everywhere() {
  gcloud compute tpus queued-resources ssh "$NAME" --zone="$ZONE" \
    --node=all --worker=all --batch-size=all --command="$1"
}
