#!/bin/bash
# Four machines with 8 GPUs each under Slurm: sbatch nbs/configs/slurm.sh. An example to adapt: it has not been run by the authors.
#SBATCH --job-name=steer_nb
#SBATCH --nodes=4
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=32
#SBATCH --time=04:00:00
#SBATCH --output=%x-%j.log
set -euo pipefail
export MAIN_PROCESS_IP=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
export OMP_NUM_THREADS=4
srun bash -c 'accelerate launch --config_file nbs/configs/several_nodes.yaml \
    --num_machines "$SLURM_NNODES" --num_processes "$((SLURM_NNODES * 8))" \
    --machine_rank "$SLURM_NODEID" --main_process_ip "$MAIN_PROCESS_IP" \
    -m steer_nb train --model meta-llama/Meta-Llama-3-8B --dtype bfloat16 --task sst2 --batch-size 256 --output runs/sst2-8b'
