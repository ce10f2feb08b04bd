#!/bin/bash
# A training on several nodes: sbatch examples/slurm.sh paper_b16 --data.source "s3://bucket/recap/{000000..139999}.tar"
#
# One task a GPU, started by srun itself, so that Slurm's signals reach every process: five minutes before the time is up
# each gets SIGUSR1, the run saves a checkpoint and ends with 0, and the job queues itself again until RUN/model is there.
#SBATCH --job-name=openvision3
#SBATCH --nodes=8
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=12
#SBATCH --time=24:00:00
#SBATCH --signal=USR1@300
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=openvision3-%j.log
set -euo pipefail

RUN=${RUN:-runs/$1} # on a disk that all nodes share
MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
MASTER_PORT=$((20000 + SLURM_JOB_ID % 20000))
export MASTER_ADDR MASTER_PORT OMP_NUM_THREADS=1

srun --kill-on-bad-exit=1 bash -c '
  export RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID WORLD_SIZE=$SLURM_NTASKS
  exec python -m openvision3 train "$@"' train "$@" --out "$RUN"

if [ ! -d "$RUN/model" ]; then scontrol requeue "$SLURM_JOB_ID"; fi
