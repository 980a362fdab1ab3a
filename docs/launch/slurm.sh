#!/bin/bash
# One process a GPU on four nodes of eight; jax finds the coordinator in Slurm's environment.
#   sbatch docs/launch/slurm.sh
# The same command again goes on from the newest checkpoint; so does a job that was preempted or
# reached its time limit: Slurm's SIGTERM makes every process save first.
#SBATCH --job-name=jaxspeed
#SBATCH --nodes=4
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=12
#SBATCH --time=24:00:00
#SBATCH --signal=TERM@300
#SBATCH --requeue
#SBATCH --output=runs/%x-%j.log
set -euo pipefail

# On storage that all nodes see.
WORKDIR="${WORKDIR:-$SLURM_SUBMIT_DIR/runs/llama2_7b}"

# ZeRO inside a node, copies of the state across nodes: mesh.data is the number of nodes.
srun --kill-on-bad-exit=1 \
  python train.py configs/llama2_7b.py \
  --mesh.data "$SLURM_JOB_NUM_NODES" \
  --workdir "$WORKDIR" \
  "$@"
