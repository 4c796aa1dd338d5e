# The OpenSTL setting, two digits at 64x64, and the model that comes with stgen: `stgen/pretrained/moving_mnist_64`.
EXTRAS=demo CLIPS=${CLIPS:-20000} HELDOUT=${HELDOUT:-256}
write_clips() { stgen data moving-mnist --size 64 --digits 2 "$@"; }
# Latents and text states are computed once, by a text encoder small enough to ship. Images and short clips teach what digits
# look like and how they move at a sixth to a third of the cost of whole clips; single digits, three fifths of the
# images, what the words mean, and, as whole clips among those of two, how a digit goes on.
encode() {
    stgen data encode --data "$run/data/$1" --vae "$run/vae/export" --text-encoder "$run/text" --max-text-length 64 \
        --batch-size 32 --out "$run/data/$2"
}
encode_clips() {
    if [ ! -d "$run/text" ]; then  # whole or not at all: one that is there is not made again
        stgen shrink-text-encoder --data "$run/data/train" --out "$run/text.tmp"
        mv "$run/text.tmp" "$run/text"
    fi
    encode train encoded
    write_clips --out "$run/data/images/two" --clips $((2 * CLIPS)) --num-frames 1 --seed 1
    write_clips --out "$run/data/images/one" --clips $((3 * CLIPS)) --num-frames 1 --seed 3 --digits 1
    stgen data index --shards "$run/data/images"
    write_clips --out "$run/data/short" --clips "$CLIPS" --num-frames 5 --seed 2
    write_clips --out "$run/data/single" --clips $((2 * CLIPS)) --num-frames 5 --seed 5 --digits 1
    write_clips --out "$run/data/mixed/two" --clips "$CLIPS" --seed 8
    write_clips --out "$run/data/mixed/one" --clips "$CLIPS" --seed 9 --digits 1
    stgen data index --shards "$run/data/mixed"
    for part in images short single mixed; do encode "$part" "encoded_$part"; done
}
# Clips of each stage but the last, which has those that are left of `samples`; the last two numbers are of few_steps.yaml.
read -r images short single mixed captioned captioned_short <<< "${STAGES:-24000 12000 8000 10000 1097600 192000}"
told='"text_dropout":0.1,"masks":[{"kind":"generate_all"}]'
stages="{\"samples\":$images,\"batch_size\":8,\"data\":{\"path\":\"$run/data/encoded_images\",\"num_frames\":1},$told}"
stages="$stages,{\"samples\":$short,\"data\":{\"path\":\"$run/data/encoded_short\",\"num_frames\":5},$told}"
stages="$stages,{\"samples\":$single,\"data\":{\"path\":\"$run/data/encoded_single\",\"num_frames\":5},$told}"
stages="$stages,{\"samples\":$mixed,\"data\":{\"path\":\"$run/data/encoded_mixed\"}}"
TRANSFORMER="data.path=$run/data/encoded text_encoder=$run/text max_text_length=64 stages=[$stages,{}] ${TRANSFORMER:-}"
# Times at which captions tell most of an image, around t = 0.7 (`validation/caption_gain`): they are heard much sooner
# there than at the times of whole clips, around 0.85.
apart="\"data\":{\"path\":\"$run/data/encoded_images\",\"num_frames\":1},\"flow\":{\"mean\":1.5,\"std\":0.8}"
stages="{\"samples\":$captioned,\"batch_size\":32,$apart,$told}"
# Short clips from their first frame too: where two digits overlap, it says which they are.
told='"text_dropout":0.1,"masks":[{"kind":"generate_all"},{"kind":"predict","args":{"given":1}}]'
stages="$stages,{\"samples\":$captioned_short,\"batch_size\":16,\"data\":{\"path\":\"$run/data/encoded_short\",\"num_frames\":5},$told}"
FURTHER="data.path=$run/data/encoded text_encoder=$run/text max_text_length=64 stages=[$stages,{}] ${FURTHER:-}"
