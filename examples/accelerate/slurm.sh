#!/bin/bash
# sbatch examples/accelerate/slurm.sh IMAGES_DIR OUTPUT_DIR [more flags of train_dopsd_lora.py]
# One launcher on each machine, one process on each of its GPUs. Both folders must be seen by all machines.
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --signal=TERM@120
set -e
[ $# -ge 2 ] || { echo "usage: sbatch $0 IMAGES_DIR OUTPUT_DIR [more flags of train_dopsd_lora.py]" >&2; exit 2; }
images=$1 output=$2
shift 2
first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=100
srun torchrun --nnodes "$SLURM_NNODES" --nproc_per_node "$SLURM_GPUS_ON_NODE" --rdzv_backend c10d --rdzv_endpoint "$first:29500" \
  --rdzv_id "$SLURM_JOB_ID" train_dopsd_lora.py --pretrained_model_name_or_path Tongyi-MAI/Z-Image-Turbo \
  --instance_data_dir "$images" --output_dir "$output" --mixed_precision bf16 --gradient_checkpointing \
  --resume_from_checkpoint latest "$@"
