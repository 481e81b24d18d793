#!/usr/bin/env bash
# Usage: setup_imagenet.sh imagenet32|imagenet64 [FOLDER OR ADDRESS OF THE TARS]
#        setup_imagenet.sh imagenet32_box|imagenet64_box [FOLDER OF THE NPZ FILES]
#
# Turns train_SxS.tar and valid_SxS.tar (S = 32 or 64; van den Oord et al. 2016) into
# imagenetS-train.npy and imagenetS-valid.npy, uint8 (n, S, S, 3), in the current folder, where
# the tars are looked for too unless a folder or the address they lie under is given. Without
# tars it tells where to get them. The tars are not changed and may be deleted afterwards.
# Run it again after an interruption; an .npy file that is complete is not made twice.
#
# The _box names stand for the other downsampled ImageNet (Chrabaszcz et al. 2017; box filter),
# on which figures are lower: train_data_batch_1.npz to _10.npz and val_data.npz, as image-net.org
# gives them to those who log in (the npz format, all unpacked into one folder), become
# imagenetS_box-train.npy and imagenetS_box-valid.npy.
#
# Environment: PYTHON          the interpreter (default: .venv of this folder, else python3)
#              IMAGENET_URL    the address, where no second argument is given
#              IMAGENET_FACTS  a file of lines "TAR BYTES SHA256 IMAGES" that replaces the
#                              published facts the tars are checked against (for the npz files
#                              train_box and valid_box stand for TAR, and only IMAGES is checked)

[ -n "${BASH_VERSION:-}" ] ||
  { echo "error: this needs bash: start it as ./setup_imagenet.sh or with bash in place of sh" >&2; exit 2; }
source "$(dirname -- "${BASH_SOURCE[0]}")/setup_common.sh"
case ${1:-} in
  imagenet32)
    size=32 torrent=bf62f5051ef878b9c357e6221e879629a9b4b172
    this_bpd=3.80 other_bpd=3.58 ;;
  imagenet64)
    size=64 torrent=96816a530ee002254d29bf7a61c0c158d3dedc3b
    this_bpd=3.52 other_bpd=3.30 ;;
  imagenet32_box) size=32 ;;
  imagenet64_box) size=64 ;;
  *)
    fail "imagenet32 or imagenet64, or one of them with _box, is needed first, not '${1:-}'; -h" \
      "shows the usage" ;;
esac
[ $# -le 2 ] || fail "two arguments at most, not $#; -h shows the usage"
from=${2:-${IMAGENET_URL:-.}}

facts="\
train_32x32.tar 4113018880 244a323d48f8d72f65ad8b54658c01fed68d2d7bdc77ccb43da58c11e94224e5 1281149
valid_32x32.tar 161474560 862e559462b24cf736212a19f6b0d47b55c2dc8ebdaa95ccecfe71260124c8f7 49999
train_64x64.tar 12112588800 e2a2c1947a748d0d256e98e6d82800d855441dc9e4de2e71a773f1324c4524d7 1281149
valid_64x64.tar 477255680 eeac03ec4f585baf871d2b4cb9c974bfe345e74878a74e5820fe6eb1041629cd 49999
train_box - - 1281167
valid_box - - 50000"
if [ -n "${IMAGENET_FACTS:-}" ]; then
  [ -r "$IMAGENET_FACTS" ] || fail "IMAGENET_FACTS names $IMAGENET_FACTS, which cannot be read"
  facts=$(cat "$IMAGENET_FACTS")
  echo "sizes, hashes and counts are those of $IMAGENET_FACTS, not the published ones"
fi

# facts_of TAR: prints BYTES SHA256 IMAGES
facts_of() {
  awk -v tar="$1" '$1 == tar { print $2, $3, $4 }' <<<"$facts"
}

# explain TAR: where the data is, for want of TAR.
explain() {
  cat >&2 <<END
error: no $1 in '$from'; its old address, www.image-net.org/small, is gone since 2021.
Academic Torrents hold it, info hash $torrent:
$(grep "_${size}x$size.tar " <<<"$facts" | awk '{ print "  " $1 ", " $2 " bytes, sha256 " $3 }')
With both in one folder: setup_imagenet.sh imagenet$size FOLDER
The downsampled ImageNet on today's image-net.org (Chrabaszcz et al. 2017) is other data: a box
filter and 1,281,167 + 50,000 labelled images, easier to model ($other_bpd against $this_bpd
bits/dim). Results on the two cannot be compared.
END
  exit 2
}

# in_place NPY COUNT: whether that file is there and whole; ends the script over one of other data.
in_place() {
  [ -e "$1" ] || return 1
  # numpy pads the header of such a file to 128 bytes
  problem=$(npy_problem "$1" $((128 + $2 * size * size * 3)) "$2,$size,$size,3") || exit
  [ -z "$problem" ] || reject "$1" "$problem"
  echo "$1 is in place"
}

# box_files train|valid: sets files to the npz files of that split, and count to their images.
box_files() {
  files=("$from"/val_data.npz)
  if [ "$1" = train ]; then files=("$from"/train_data_batch_{1..10}.npz); fi
  read -r _ _ count <<<"$(facts_of "$1_box")"
  [ -n "$count" ] || fail "IMAGENET_FACTS has no line '$1_box - - IMAGES'; add it"
}

if [ "${1%_box}" != "$1" ]; then
  todo=
  for split in valid train; do
    box_files $split
    if in_place "$1-$split.npy" "$count"; then continue; fi
    todo="$todo $split"
    for file in "${files[@]}"; do
      [ -e "$file" ] || fail "no $file; name the folder of the npz files, -h tells which"
    done
  done
  for split in $todo; do
    box_files $split
    "$PYTHON" "$here/files_to_npy.py" "${files[@]}" "$1-$split.npy" --expect "$count" --side $size
  done
  if [ -z "$todo" ]; then echo "nothing to do"; fi
  exit
fi

# What is to be done; a missing tar is reported before hours of work on the other one.
todo=
for split in valid train; do
  tar=${split}_${size}x$size.tar npy=imagenet$size-$split.npy
  read -r bytes sha256 count <<<"$(facts_of "$tar")"
  [ -n "$count" ] || fail "IMAGENET_FACTS has no line '$tar BYTES SHA256 IMAGES'; add it"
  if in_place "$npy" "$count"; then continue; fi
  todo="$todo $split"
  case $from in *://*) continue ;; esac
  [ -e "$from/$tar" ] || explain "$tar"
done

for split in $todo; do
  tar=${split}_${size}x$size.tar npy=imagenet$size-$split.npy
  read -r bytes sha256 count <<<"$(facts_of "$tar")"
  case $from in
    *://*)
      file=$tar
      if [ ! -e "$tar" ]; then
        file=$tar.part
        fetch "${from%/}/$tar" "$file"
      fi ;;
    *) file=$from/$tar ;;
  esac
  other="it is damaged or other data, such as the box-filtered downsampled ImageNet"
  found=$(bytes_of "$file")
  [ "$found" = "$bytes" ] ||
    reject "$file" "$file has $found bytes where $bytes are expected: $other"
  echo "checking the sha256 of $file"
  found=$(checksum sha256 "$file")
  [ "$found" = "$sha256" ] ||
    reject "$file" "$file has sha256 $found where $sha256 is expected: $other"
  if [ "$file" = "$tar.part" ]; then
    mv "$file" "$tar"
    file=$tar
  fi
  echo "converting $file"
  "$PYTHON" "$here/files_to_npy.py" "$file" "$npy" --expect "$count" --side $size
done
if [ -z "$todo" ]; then echo "nothing to do"; fi
