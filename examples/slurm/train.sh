#!/bin/bash
# One training run on several machines: torchrun on each, one process per GPU. Submit it again, and it goes on.
#
#   sbatch --nodes 2 --gpus-per-node 4 train.sh cifar10-resnet18-w1a32 data runs/r18
#
#SBATCH --job-name=abste-train
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=16
#SBATCH --time=24:00:00
#SBATCH --signal=TERM@180
#SBATCH --output=train-%j.log
set -eu
recipe=$1 data=$2 out=$3

first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
resume=()
[ -e "$out/recipe.toml" ] && resume=(--resume)

# srun passes the signal on; all processes agree on a step, write a checkpoint and end within the three minutes. A worker
# that dies takes the others with it, and torchrun starts them all again from the last checkpoint.
exec srun torchrun \
    --nnodes "$SLURM_NNODES" --nproc-per-node "${SLURM_GPUS_ON_NODE:-1}" --max-restarts 3 \
    --rdzv-id "$SLURM_JOB_ID" --rdzv-backend c10d --rdzv-endpoint "$first:29500" \
    -m abste train "$recipe" --data "$data" --out "$out" "${resume[@]}"
