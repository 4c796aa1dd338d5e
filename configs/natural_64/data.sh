# Real colour video at 64x64, half of it Atari games; a VAE alone. See README.md, "Natural video".
EXTRAS=demo,natural CLIPS=${CLIPS:-4000} HELDOUT=${HELDOUT:-96}
write_clips() { stgen data natural "$@"; }
