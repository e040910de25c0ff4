#!/bin/bash
# gradsift on several nodes of a SLURM cluster, over a Ray cluster that lives as long as the job.
#
#   sbatch examples/slurm.sh --model Qwen/Qwen2.5-1.5B --pool 'data/*.jsonl' \
#       --target gsm8k=gsm8k_dev.jsonl --output-dir /shared/runs/gsm8k
#
# Everything behind the script's name goes to `gradsift select`. The folder has to be one that all
# nodes see (or s3://…). A job that ran into its time limit, or lost a node for good, is submitted
# again as it was: it goes on where it stopped.
#SBATCH --job-name=gradsift
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=16
#SBATCH --gpus-per-task=8
#SBATCH --time=12:00:00
#SBATCH --requeue
set -euo pipefail

export RAY_AUTH_MODE=token # nobody else's processes join; the home directory is shared
ray get-auth-token --generate >/dev/null
port=${RAY_PORT:-6379}
gpus=${SLURM_GPUS_PER_TASK:-0}
mapfile -t nodes < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
head=${nodes[0]}
head_ip=$(srun --nodes=1 --ntasks=1 --nodelist="$head" hostname --ip-address | awk '{print $1}')
address=$head_ip:$port
resources=(--num-cpus="$SLURM_CPUS_PER_TASK" --num-gpus="${gpus##*:}")

srun --overlap --cpus-per-task="$SLURM_CPUS_PER_TASK" --nodes=1 --ntasks=1 --nodelist="$head" \
    ray start --head --node-ip-address="$head_ip" --port="$port" "${resources[@]}" --block &
ray=$!
trap 'kill $(jobs -p) 2>/dev/null || true; wait' EXIT
until ray health-check --address="$address" >/dev/null 2>&1; do
    kill -0 "$ray" # or it failed to start
    sleep 1
done

if ((${#nodes[@]} > 1)); then
    others=$((${#nodes[@]} - 1))
    srun --overlap --cpus-per-task="$SLURM_CPUS_PER_TASK" --nodes="$others" --ntasks="$others" --exclude="$head" \
        ray start --address="$address" "${resources[@]}" --block &
fi

gradsift select --engine ray --ray-address "$address" "$@"
