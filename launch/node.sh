#!/usr/bin/env bash
# One machine's part of a run on several: its launcher, which meets the others' at HEAD:PORT and starts PROCESSES here.
#   launch/node.sh MACHINES RANK HEAD PORT PROCESSES SCRIPT [ARGUMENTS...]
#   ACCELERATE_CONFIG=file  strategy and precision, from configs/accelerate (default ddp.yaml there)
# Called by slurm.sh, hosts.sh and ray_train.py beside it. SIGUSR1 and SIGTERM reach the training processes, which save and
# stop; the launcher itself would end them, of SIGUSR1 at once and of SIGTERM after 30 seconds, saved or not.
set -euo pipefail
[ $# -ge 6 ] || { sed -n '3s/^# *//p' "$0" >&2; exit 2; }
machines=$1 rank=$2 head=$3 port=$4 processes=$5
shift 5
cd "$(dirname "${BASH_SOURCE[0]}")/.."

accelerate launch --config_file "${ACCELERATE_CONFIG:-configs/accelerate/ddp.yaml}" \
    --num_machines "$machines" --machine_rank "$rank" --main_process_ip "$head" --main_process_port "$port" \
    --num_processes $((machines * processes)) "$@" &
launcher=$!
trap 'pkill -USR1 -P "$launcher" || true' USR1 TERM
while kill -0 "$launcher" 2>/dev/null; do
    wait "$launcher" || true  # a signal ends `wait` before the launcher has ended
done
wait "$launcher"
