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
# encode_clips, if there, stores latents before the transformer is trained.
# EXTRAS, CLIPS, HELDOUT, write_clips, and VAE, TRANSFORMER, FURTHER, EVALUATE, SHIPPED, RECONSTRUCT: further arguments of each step
source "configs/$config/data.sh"
source launch/setup.sh "$EXTRAS"
begin=$SECONDS
transformer=configs/$config/transformer.yaml
steps=5
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
echo "== 3/5 the transformer"
! declare -F encode_clips > /dev/null || encode_clips
"${launch[@]}" stgen/train.py --config "$transformer" run="$run/transformer" \
    vae="$run/vae/export" data.path="$run/data/train" ${TRANSFORMER:-}
trained=$run/transformer/export
# A second run that goes on from the first with another objective, where the configuration has one.
further=configs/$config/few_steps.yaml
if [ -f "$further" ]; then
    "${launch[@]}" stgen/train.py --config "$further" run="$run/few_steps" init="$trained" vae="$run/vae/export" ${FURTHER:-}
    trained=$run/few_steps/export
fi
echo "== trained in $(((SECONDS - begin) / 60)) min $(((SECONDS - begin) % 60)) s"
echo "== 4/5 evaluation on held-out clips"
stgen evaluate --pipeline "$trained" --data "$run/data/heldout" --out "$run/report" --steps 10 ${EVALUATE:-}
echo "== 5/5 the model that comes with stgen, on held-out clips of its own kind: two digits at 64x64"
stgen data moving-mnist --out "$run/data/shipped" --clips 32 --split heldout
stgen evaluate --pipeline moving_mnist_64 --data "$run/data/shipped" --out "$run/report_shipped" \
    --clips 32 --samples 1 --steps 3 --text-steps 20 --guidance-scale 8 ${SHIPPED:-} > /dev/null
echo "== from scratch in minutes, and shipped: each beside the best naive baseline of its own clips"
stgen compare scratch="$run/report" shipped="$run/report_shipped"
echo "== done in $(((SECONDS - begin) / 60)) min: look at contact_sheet.png and report.md in $run/report and $run/report_shipped"
