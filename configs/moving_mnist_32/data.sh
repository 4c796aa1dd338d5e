# One digit at 32x32: what fifteen minutes of two cores can learn. See ../moving_mnist_64 for two digits at 64x64.
EXTRAS=demo CLIPS=${CLIPS:-16000} HELDOUT=${HELDOUT:-128}
write_clips() { stgen data moving-mnist --size 32 --digits 1 "$@"; }
