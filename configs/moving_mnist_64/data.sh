# The OpenSTL setting, two digits at 64x64, and the model that comes with stgen: `stgen/pretrained/moving_mnist_64`.
EXTRAS=demo CLIPS=${CLIPS:-20000} HELDOUT=${HELDOUT:-256}
write_clips() { stgen data moving-mnist --size 64 --digits 2 "$@"; }
# Latents and text states are computed once, by a text encoder small enough to ship.
encode_clips() {
    [ -d "$run/text" ] || stgen shrink-text-encoder --data "$run/data/train" --out "$run/text"
    stgen data encode --data "$run/data/train" --vae "$run/vae/export" --text-encoder "$run/text" --max-text-length 64 \
        --batch-size 32 --out "$run/data/encoded"
}
TRANSFORMER="data.path=$run/data/encoded text_encoder=$run/text max_text_length=64 ${TRANSFORMER:-}"
