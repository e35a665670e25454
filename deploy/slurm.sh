#!/bin/bash
# Trains on any number of nodes, one torchrun per node:   sbatch --nodes 4 deploy/slurm.sh lm --data D --autoencoder A --out RUN data.rows=32
# (4 nodes of 8 GPUs are 32 processes, which share the train.accumulate x data.rows windows of a step equally.)
# Everything after the script goes to `nextvec train`. RUN, the shards and the autoencoder lie on a file system that all
# nodes share. At the end of its time, or preempted, the job saves and goes back into the queue, from where it goes on.
#SBATCH --job-name=nextvec
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --signal=B:TERM@300
#SBATCH --open-mode=append
set -u

run=""
words=("$@")
for index in "${!words[@]}"; do
    if [[ "${words[$index]}" == "--out" ]]; then run="${words[$((index + 1))]}"; fi
done
if [[ -z "$run" ]]; then
    echo "slurm.sh: give what \`nextvec train\` takes, with --out RUN" >&2
    exit 2
fi
if [[ -f "$run/config.yaml" ]]; then words+=(--resume); fi # decided once, for all nodes

head="$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)"
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-8}"
srun torchrun \
    --nnodes "$SLURM_JOB_NUM_NODES" \
    --nproc-per-node "${SLURM_GPUS_ON_NODE:-8}" \
    --rdzv-backend c10d \
    --rdzv-id "$SLURM_JOB_ID" \
    --rdzv-endpoint "$head:29500" \
    --max-restarts 3 \
    --no-python nextvec train "${words[@]}" &
training=$!

requeue() {
    scancel --signal=TERM "$SLURM_JOB_ID.0" # every process finishes its step; process 0 saves
    wait "$training"
    scontrol requeue "$SLURM_JOB_ID"
    exit 0
}
trap requeue TERM
wait "$training"
