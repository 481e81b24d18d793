#!/usr/bin/env bash
# Usage: setup_ffhq256.sh [FOLDER]
#
# Downloads FFHQ at 256x256, 13.8 GB, as FOLDER/ffhq-256.npy, uint8 (70000, 256, 256, 3) (FOLDER:
# the current one unless given). Run it again after an interruption: it continues. Once the file
# is there it does nothing.
#
# Environment: PYTHON         the interpreter (default: .venv of this folder, else python3)
#              FFHQ256_URL    another address of ffhq-256.npy
#              FFHQ256_BYTES  its size, where that is not the published 13762560128

[ -n "${BASH_VERSION:-}" ] ||
  { echo "error: this needs bash: start it as ./setup_ffhq256.sh or with bash in place of sh" >&2; exit 2; }
source "$(dirname -- "${BASH_SOURCE[0]}")/setup_common.sh"
[ $# -le 1 ] || fail "one folder at most, not $#; -h shows the usage"

assets=https://openaipublic.blob.core.windows.net/very-deep-vaes-assets/vdvae-assets
url=${FFHQ256_URL:-$assets/ffhq-256.npy}
bytes=${FFHQ256_BYTES:-13762560128}
folder=${1:-.}
npy=$folder/ffhq-256.npy

if [ -n "${FFHQ256_BYTES:-}" ]; then echo "FFHQ256_BYTES is set: the size is checked against it"; fi
if [ -e "$npy" ]; then
  problem=$(npy_problem "$npy" "$bytes" 70000,256,256,3)
  [ -z "$problem" ] || reject "$npy" "$problem"
  echo "$npy is in place, nothing to do"
  exit
fi

make_folder "$folder"
fetch "$url" "$npy.part"
problem=$(npy_problem "$npy.part" "$bytes" 70000,256,256,3)
[ -z "$problem" ] || reject "$npy.part" "$problem"
mv "$npy.part" "$npy"
echo "$npy is ready"
