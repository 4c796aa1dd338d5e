#!/usr/bin/env bash
# Sets everything up, then the main job on a CPU: real digits -> shards -> VAE -> transformer -> evaluation.
# Every step resumes or is skipped when it is done, so the same command goes on after an interruption.
#   RUN=folder     where everything goes (default runs/demo)
#   CONFIG=name    folder in configs/ (default moving_mnist_32; moving_mnist_64 for two digits at 64x64, hours on a CPU)
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh" demo
config=${CONFIG:-moving_mnist_32}
run=${RUN:-runs/demo}
source "configs/$config/data.sh"  # SIZE, DIGITS, CLIPS, and VAE, TRANSFORMER, EVALUATE: further arguments of each step
begin=$SECONDS

echo "== 1/4 data: $CLIPS clips from the 4,000 training digits, 128 from the 1,000 held-out ones"
stgen data moving-mnist --out "$run/data/train" --clips "$CLIPS" --size "$SIZE" --digits "$DIGITS"
stgen data moving-mnist --out "$run/data/heldout" --clips 128 --split heldout --size "$SIZE" --digits "$DIGITS"
launch=(accelerate launch --config_file configs/accelerate/cpu.yaml)
echo "== 2/4 the VAE"
"${launch[@]}" stgen/train_vae.py --config "configs/$config/vae.yaml" run="$run/vae" data.path="$run/data/train" ${VAE:-}
echo "== 3/4 the transformer"
"${launch[@]}" stgen/train.py --config "configs/$config/transformer.yaml" run="$run/transformer" \
    vae="$run/vae/export" data.path="$run/data/train" ${TRANSFORMER:-}
echo "== trained in $(((SECONDS - begin) / 60)) min $(((SECONDS - begin) % 60)) s"
echo "== 4/4 evaluation on held-out digits"
stgen evaluate --pipeline "$run/transformer/export" --data "$run/data/heldout" --out "$run/report" --steps 10 ${EVALUATE:-}
echo "== done in $(((SECONDS - begin) / 60)) min: look at $run/report/contact_sheet.png and $run/report/report.md"
