# The OpenSTL setting: two digits at 64x64.
SIZE=64 DIGITS=2 CLIPS=${CLIPS:-10000}
