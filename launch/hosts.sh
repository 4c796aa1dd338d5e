#!/usr/bin/env bash
# A run on machines that ssh reaches: one launcher on each, which meet at the first.
#   launch/hosts.sh HOSTFILE SCRIPT [ARGUMENTS...]
# HOSTFILE has a line `HOST slots=N` for each machine, N its training processes, the same for all; # begins a comment.
#   PORT=n                  where the launchers meet (default 29500)
#   HEAD=address            how the machines reach the first one (default: its name in HOSTFILE)
#   ACCELERATE_CONFIG=file  strategy and precision, from configs/accelerate (default ddp.yaml there)
#   STGEN_REPOSITORY=folder this repository on every machine (default: where it lies here)
#   STGEN_VENV=folder       the environment on every machine (default: .venv in the repository)
# The run folder must be seen by all machines. When one fails, the others are stopped; the same command goes on.
set -euo pipefail
[ $# -ge 2 ] || { sed -n '3s/^# *//p' "$0" >&2; exit 2; }
hostfile=$1
shift
[ -f "$hostfile" ] || { echo "error: HOSTFILE is '$hostfile', allowed: a file" >&2; exit 2; }
repository=${STGEN_REPOSITORY:-$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)}
venv=${STGEN_VENV:-$repository/.venv}

hosts=() slots=
while read -r host count _; do
    [ -n "$host" ] || continue
    [[ $count =~ ^slots=[1-9][0-9]*$ ]] || { echo "error: $hostfile: '$host $count', allowed: HOST slots=N" >&2; exit 2; }
    # Accelerate starts as many processes on each machine.
    [ "${slots:=$count}" = "$count" ] || { echo "error: $hostfile: $host has $count, others $slots: the same for all" >&2; exit 2; }
    hosts+=("$host")
done < <(sed 's/#.*//' "$hostfile")
[ ${#hosts[@]} -gt 0 ] || { echo "error: $hostfile names no host" >&2; exit 2; }

environment="PATH=$(printf %q "$venv/bin"):\$PATH ACCELERATE_CONFIG=$(printf %q "${ACCELERATE_CONFIG:-configs/accelerate/ddp.yaml}")"
launchers=()
stop() { kill "${launchers[@]}" 2>/dev/null || true; }
trap stop INT TERM
for rank in "${!hosts[@]}"; do
    # Quoted once more, since ssh hands one line to a shell.
    command=$(printf '%q ' "$repository/launch/node.sh" "${#hosts[@]}" "$rank" "${HEAD:-${hosts[0]}}" "${PORT:-29500}" \
        "${slots#slots=}" "$@")
    command="export $environment; exec $command"
    # With a terminal (-tt), what runs there ends when the connection does.
    ssh -tt -o BatchMode=yes "${hosts[$rank]}" "$command" </dev/null &
    launchers+=($!)
done
status=0
for _ in "${launchers[@]}"; do
    wait -n && ended=0 || ended=$?
    if [ "$ended" -ne 0 ] && [ "$status" -eq 0 ]; then
        status=$ended
        stop
    fi
done
exit "$status"
