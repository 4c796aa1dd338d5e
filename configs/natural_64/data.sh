# Real colour video at 64x64, half of it Atari games; a VAE alone. See README.md, "Natural video".
EXTRAS=demo,natural,perceptual CLIPS=${CLIPS:-4000} HELDOUT=${HELDOUT:-96}
VAE="validation.path=$run/data/heldout ${VAE:-}" RECONSTRUCT="--perceptual efficientnet_lite0 ${RECONSTRUCT:-}"
write_clips() { stgen data natural "$@"; }
