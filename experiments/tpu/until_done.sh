#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Runs a command on every worker until it succeeds, with new machines whenever they were
# taken away. Only for a command that resumes when it is run again. A command that fails
# while its machines stay is not repeated, unless its exit status is 75: stopped, saved
# its state, must be run again.
set -euo pipefail
here=$(dirname "$0")
source "$here/common.sh"

while true; do
  case "$(state)" in
    ACTIVE) ;;
    "")
      "$here/create.sh" ;;
    FAILED | SUSPENDED)
      gcloud compute tpus queued-resources delete "$NAME" --zone="$ZONE" --force --quiet
      continue ;;
    *)
      sleep 60
      continue ;;
  esac
  status=0
  "$here/install.sh" && "$here/all.sh" "$@" && exit 0 || status=$?

  # Taken away, or failed by itself? It takes a while until the state tells.
  for _ in 1 2 3 4 5; do
    sleep 60
    if [ "$(state)" != ACTIVE ]; then
      echo "the machines were taken away; asking for new ones"
      continue 2
    fi
  done
  if [ "$status" = 75 ]; then
    echo "the command was stopped and has saved its state; running it again"
    continue
  fi
  echo "the command failed with status $status, and its machines are still there" >&2
  exit "$status"
done
