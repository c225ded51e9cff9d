#!/bin/bash
# A study on Slurm nodes: sbatch configs/cluster/slurm.sh configs/sweep.yaml [options of pagating sweep]
# Run it from the repository, on a file system that all nodes see, with .venv made there (make sweep makes it).
# Cut off by the time limit, it is submitted again as it was: the study goes on where it stopped.
#SBATCH --job-name=pagating
#SBATCH --nodes=4
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=16
#SBATCH --time=08:00:00
#SBATCH --signal=B:TERM@120
#SBATCH --output=pagating-%j.log

set -euo pipefail

if [[ $# -lt 1 ]]; then
  echo "usage: sbatch configs/cluster/slurm.sh STUDY.yaml [options of pagating sweep]" >&2
  exit 2
fi
for variable in SLURM_JOB_ID SLURM_JOB_NODELIST SLURM_JOB_NUM_NODES SLURM_CPUS_PER_TASK; do
  if [[ -z "${!variable:-}" ]]; then
    echo "$variable is not set: this script runs under sbatch" >&2
    exit 2
  fi
done

bin="$PWD/.venv/bin"
port=$((20000 + SLURM_JOB_ID % 20000)) # two jobs may share a node
scratch="/tmp/pagating-$SLURM_JOB_ID"  # on each node's own disk; the paths of Ray's sockets must be short
mapfile -t nodes < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
head="${nodes[0]}"
head_ip=$(srun --nodes=1 --ntasks=1 --nodelist="$head" hostname --ip-address | awk '{print $1}')

RAY_AUTH_TOKEN=$("$bin/python" -c 'import secrets; print(secrets.token_hex(32))')
export RAY_AUTH_MODE=token RAY_AUTH_TOKEN RAY_USAGE_STATS_ENABLED=0
export PAGATING_CACHE="$scratch/cache" # each node keeps its copy of the tokens on its own disk

ray_on() { # NODES NODELIST ARGUMENTS...: Ray in the foreground, for as long as the job lasts
  local count=$1 where=$2
  shift 2
  srun --nodes="$count" --ntasks="$count" --nodelist="$where" --overlap \
    "$bin/ray" start --block --num-cpus="$SLURM_CPUS_PER_TASK" --num-gpus="${SLURM_GPUS_ON_NODE:-0}" "$@" &
}

ray_on 1 "$head" --head --node-ip-address="$head_ip" --port="$port" --temp-dir="$scratch/ray" --include-dashboard=false
for _ in {1..60}; do
  if srun --nodes=1 --ntasks=1 --nodelist="$head" --overlap \
    "$bin/ray" status --address="$head_ip:$port" > /dev/null 2>&1; then
    break
  fi
  sleep 2
done
if ((SLURM_JOB_NUM_NODES > 1)); then
  rest=$(IFS=,; echo "${nodes[*]:1}")
  ray_on $((SLURM_JOB_NUM_NODES - 1)) "$rest" --address="$head_ip:$port"
fi

study=$1
shift
# on the head, beside Ray; --signal asks for an orderly stop two minutes before the time limit
srun --nodes=1 --ntasks=1 --nodelist="$head" --overlap \
  "$bin/pagating" sweep "$study" --address "$head_ip:$port" "$@" &
sweep=$!
trap 'kill -TERM "$sweep"' TERM
code=0
wait "$sweep" || code=$?
if ((code > 128)); then # the signal ended this wait, not yet the study
  wait "$sweep" || code=$?
fi
exit "$code" # Slurm ends the Ray nodes with the job
