#!/bin/sh
# A LoRA for Krea-2-Turbo at 1024 x 1024 on a card of 12 GB: sh krea_2_turbo_12gb.sh my_images my_lora [more flags]
set -e
[ $# -ge 2 ] || { echo "usage: sh $0 IMAGES_DIR OUTPUT_DIR [more flags of train_dopsd_lora.py]" >&2; exit 2; }
images=$1 output=$2
shift 2
exec python "$(dirname "$0")/../../train_dopsd_lora.py" --pretrained_model_name_or_path krea/Krea-2-Turbo \
  --instance_data_dir "$images" --output_dir "$output" --resolution 1024 --rank 8 --mixed_precision bf16 \
  --gradient_checkpointing --optimizer adamw8bit --quantization nf4 --validation_steps 0 "$@"
