# One digit at 32x32: what fifteen minutes of two cores can learn. See ../moving_mnist_64 for two digits at 64x64.
SIZE=32 DIGITS=1 CLIPS=${CLIPS:-16000}
