#!/bin/bash
# Two machines of 8 GPUs under SLURM:   sbatch launch/slurm.sh train_sft.py configs/tulu10.py --save_minutes=30
# Submit from the checkout, on a file system that all machines share. The same line goes on where a job ended,
# also with other --nodes or --gpus-per-node.
#SBATCH --job-name=glassbox
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=24:00:00
#SBATCH --signal=TERM@300
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=slurm-%j.log
# --ntasks-per-node: one torchrun a machine starts a process a GPU. --signal: the run saves and ends five minutes
# before its time is up. --requeue: a preempted job waits for machines again, and then goes on.
set -eu

export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 # a restart begins with a new store: docs/many_machines.md
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=280   # seconds for a step and its save before torchrun kills; 30 by default

first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
srun --cpus-per-task="$SLURM_CPUS_PER_TASK" .venv/bin/torchrun \
  --nnodes "$SLURM_JOB_NUM_NODES" --nproc-per-node "$SLURM_GPUS_ON_NODE" --max-restarts 3 \
  --rdzv-backend c10d --rdzv-endpoint "$first:29500" --rdzv-id "$SLURM_JOB_ID" "$@"
