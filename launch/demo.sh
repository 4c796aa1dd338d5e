#!/usr/bin/env bash
# Sets everything up, then the main job on a CPU: data -> shards -> VAE -> transformer -> evaluation.
# Every step resumes or is skipped when it is done, so the same command goes on after an interruption.
#   RUN=folder     where everything goes (default runs/demo)
#   CONFIG=name    folder in configs/ (default moving_mnist_32; moving_mnist_64 for two digits at 64x64, hours on a CPU;
#                  natural_64 for real colour video: a VAE alone, and its report)
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
config=${CONFIG:-moving_mnist_32}
run=${RUN:-runs/demo}
# EXTRAS, CLIPS, HELDOUT, write_clips, and VAE, TRANSFORMER, EVALUATE, RECONSTRUCT: further arguments of each step
source "configs/$config/data.sh"
source launch/setup.sh "$EXTRAS"
begin=$SECONDS
transformer=configs/$config/transformer.yaml
steps=4
[ -f "$transformer" ] || steps=3  # a VAE alone

echo "== 1/$steps data: $CLIPS clips for training, $HELDOUT from digits, videos or games that training never sees"
write_clips --out "$run/data/train" --clips "$CLIPS"
write_clips --out "$run/data/heldout" --clips "$HELDOUT" --split heldout
launch=(accelerate launch --config_file configs/accelerate/cpu.yaml)
echo "== 2/$steps the VAE"
"${launch[@]}" stgen/train_vae.py --config "configs/$config/vae.yaml" run="$run/vae" data.path="$run/data/train" ${VAE:-}
if [ ! -f "$transformer" ]; then
    echo "== 3/3 the VAE on held-out clips"
    stgen reconstruct --vae "$run/vae/export" --data "$run/data/heldout" --out "$run/report" ${RECONSTRUCT:-}
    echo "== done in $(((SECONDS - begin) / 60)) min: look at $run/report/report.md and the pictures beside it"
    exit
fi
echo "== 3/4 the transformer"
"${launch[@]}" stgen/train.py --config "$transformer" run="$run/transformer" \
    vae="$run/vae/export" data.path="$run/data/train" ${TRANSFORMER:-}
echo "== trained in $(((SECONDS - begin) / 60)) min $(((SECONDS - begin) % 60)) s"
echo "== 4/4 evaluation on held-out clips"
stgen evaluate --pipeline "$run/transformer/export" --data "$run/data/heldout" --out "$run/report" --steps 10 ${EVALUATE:-}
echo "== done in $(((SECONDS - begin) / 60)) min: look at $run/report/contact_sheet.png and $run/report/report.md"
