#!/usr/bin/env bash
# Train on ImageNet on several machines under SLURM: one torchrun each, one process per GPU.
#
#     sbatch --nodes=2 scripts/slurm.sh /data/imagenet -a resnet18d --deconv True -j 32
#
# The arguments are those of main_imagenet.py. The run goes to runs/slurm-JOB. A failed process and a
# requeued job continue from the last checkpoint.
#SBATCH --job-name=deconv
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --requeue
set -euo pipefail

# Each restart uses a new store, because the old store holds the addresses of dead processes.
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
read -r first < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
srun --cpus-per-task="$SLURM_CPUS_PER_TASK" torchrun \
    --nnodes "$SLURM_JOB_NUM_NODES" \
    --nproc-per-node gpu \
    --rdzv-backend c10d \
    --rdzv-id "$SLURM_JOB_ID" \
    --rdzv-endpoint "$first:29500" \
    --max-restarts 3 \
    main_imagenet.py --run-dir "runs/slurm-$SLURM_JOB_ID" --resume auto "$@"
