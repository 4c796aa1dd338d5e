#!/usr/bin/env bash
# A run on a SLURM cluster: one launcher a node, started through srun, which meet at the first node.
#   sbatch --nodes 4 --gpus-per-node 8 [--time ...] launch/slurm.sh SCRIPT [ARGUMENTS...]
#   sbatch --nodes 4 --gpus-per-node 8 launch/slurm.sh stgen/train.py --config configs/.../transformer.yaml run=runs/large
#   PROCESSES=n             training processes of a node (default: its GPUs)
#   PORT=n                  where the launchers meet (default: by job, since nodes may be shared)
#   ACCELERATE_CONFIG=file  strategy and precision, from configs/accelerate (default ddp.yaml there)
#   STGEN_REPOSITORY=folder this repository, seen by all nodes (default: where sbatch was called)
# The environment that has `accelerate` is the one in which sbatch was called. The run folder must be seen by all nodes.
# Minutes before the time limit SLURM sends SIGUSR1: the run saves and stops, and the job is queued again and goes on.
#SBATCH --job-name=stgen
#SBATCH --ntasks-per-node=1
#SBATCH --signal=B:USR1@300
#SBATCH --requeue
#SBATCH --open-mode=append
set -euo pipefail
[ $# -ge 1 ] || { sed -n '3s/^# *//p' "$0" >&2; exit 2; }
# SLURM runs a copy of this file, so where it lies says nothing.
cd "${STGEN_REPOSITORY:-$SLURM_SUBMIT_DIR}"
processes=${PROCESSES:-${SLURM_GPUS_ON_NODE:-1}}
port=${PORT:-$((20000 + SLURM_JOB_ID % 20000))}
hosts=$(scontrol show hostnames "$SLURM_JOB_NODELIST")
head=${hosts%%$'\n'*}

# The node's number is known on the node alone.
# shellcheck disable=SC2016
srun --kill-on-bad-exit=1 bash -c 'exec launch/node.sh "$SLURM_NNODES" "$SLURM_NODEID" "$@"' node \
    "$head" "$port" "$processes" "$@" &
step=$!
stopping=
trap 'stopping=1; kill -USR1 "$step"' USR1  # srun passes it on to every node
while kill -0 "$step" 2>/dev/null; do
    wait "$step" || true  # a signal ends `wait` before the step has ended
done
wait "$step" && status=0 || status=$?
if [ -n "$stopping" ] && [ "$status" -ne 0 ]; then
    echo "== saved before the time limit; queued again"
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
