#!/bin/bash
# A Cloud TPU slice: makes it, installs jaxspeed on all of its hosts, trains, and says how to take it down.
#   PROJECT=mine ZONE=us-east5-a REPO=https://... RUNS=/mnt/runs bash docs/launch/tpu_vm.sh [--steps N ...]
set -euo pipefail

NAME="${NAME:-jaxspeed}"
TYPE="${TYPE:-v5p-128}" # 64 chips: v5p counts cores
VERSION="${VERSION:-v2-alpha-tpuv5}"
: "${PROJECT:?the Google Cloud project}" "${ZONE:?a zone that has TPUs}" "${REPO:?where git finds this repository}"
: "${RUNS:?a folder on storage that all hosts have mounted, Filestore for instance}"

where=(--project "$PROJECT" --zone "$ZONE")
tpu() { gcloud compute tpus tpu-vm "$@" "${where[@]}"; }
on_all() { tpu ssh "$NAME" --worker=all --command "$1"; }

tpu describe "$NAME" >/dev/null 2>&1 ||
  tpu create "$NAME" --accelerator-type "$TYPE" --version "$VERSION"
on_all "test -d jaxspeed || git clone -q '$REPO' jaxspeed"
on_all "cd jaxspeed && python3 -m venv .venv && .venv/bin/pip install -q '.[tpu]'"
# The same command on every host; each finds the others by itself.
on_all "cd jaxspeed && .venv/bin/python train.py configs/llama2_7b.py --workdir '$RUNS/llama2_7b' ${*:-}"

echo "done; to take it down: gcloud compute tpus tpu-vm delete $NAME ${where[*]}"
