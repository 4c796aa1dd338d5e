# The OpenSTL setting: two digits at 64x64.
EXTRAS=demo CLIPS=${CLIPS:-10000} HELDOUT=${HELDOUT:-128}
write_clips() { stgen data moving-mnist --size 64 --digits 2 "$@"; }
