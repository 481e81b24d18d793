# What the setup_*.sh scripts share. They source it; it is not a command of its own.
#
# Every file is written as NAME.part and renamed when it has passed its checks, so that a file
# under its final name is whole, and an interrupted run is repaired by running it again.

[ -n "${BASH_VERSION:-}" ] && [ "$0" != "${BASH_SOURCE:-}" ] ||
  { echo "error: this is no command: start one of the other setup_*.sh, with bash" >&2; exit 2; }
set -euo pipefail

here=$(CDPATH='' cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd)

# fail MESSAGE: what the user can put right, in one line; status 2, as in the Python programs.
fail() {
  echo "error: $*" >&2
  exit 2
}

if [ -z "${PYTHON:-}" ]; then
  if [ -x "$here/.venv/bin/python" ]; then PYTHON=$here/.venv/bin/python; else PYTHON=python3; fi
fi

case ${1:-} in
  -h | --help) # the comment at the head of the script is its manual
    awk 'NR > 1 { if (!/^#/) exit; sub(/^# ?/, ""); print }' "$0"
    exit ;;
  -*) fail "unknown option $1; -h shows the usage" ;;
esac
# All that data.py needs, now and not after hours of downloading.
"$PYTHON" -c 'import hashlib, importlib.util, numpy
hashlib.file_digest, *(importlib.util.find_spec(m).name for m in ("torch", "PIL", "tqdm"))' \
  2>/dev/null ||
  fail "$PYTHON is not Python 3.11 or newer with requirements.txt installed; set PYTHON to one"

# make_folder FOLDER
make_folder() {
  { mkdir -p "$1" && [ -w "$1" ]; } 2>/dev/null || fail "cannot write to $1; name another folder"
}

# checksum md5|sha256 FILE: the hash in hex. Python has it on every system, md5sum is not on all.
checksum() {
  "$PYTHON" -c 'import hashlib, sys
with open(sys.argv[2], "rb") as f: print(hashlib.file_digest(f, sys.argv[1]).hexdigest())' "$1" "$2"
}

# bytes_of FILE
bytes_of() {
  echo $(($(wc -c <"$1"))) # the arithmetic strips the blanks that BSD wc puts in front
}

# npy_problem FILE BYTES SHAPE: prints what is wrong with the .npy file, or nothing.
# SHAPE is separated by commas. Only the header and the size are read, none of the images.
npy_problem() {
  "$PYTHON" - "$@" <<'END'
import os
import sys

import numpy as np

path, size, shape = sys.argv[1], int(sys.argv[2]), tuple(map(int, sys.argv[3].split(",")))
if os.path.getsize(path) != size:
    print(f"{path} has {os.path.getsize(path)} bytes where {size} are expected")
    sys.exit()
try:
    with open(path, "rb") as f:
        np.lib.format.read_magic(f)
        found, fortran_order, dtype = np.lib.format.read_array_header_1_0(f)
except ValueError as error:
    print(f"{path} is not an .npy file ({error})".replace("\n", " "))
    sys.exit()
if (found, fortran_order, dtype) != (shape, False, np.uint8):
    order = " in Fortran order" if fortran_order else ""
    print(f"{path} holds {dtype} {found}{order} where uint8 {shape} is expected")
END
}

# fetch URL FILE.part: downloads, continuing what an earlier attempt or run left of FILE.part.
# curl's own --retry would go back to where this run began, and lose gigabytes at every break.
fetch() {
  local url=$1 part=$2 attempt answer status quiet=--silent
  command -v curl >/dev/null || fail "curl is needed to download $url; install it"
  if [ -t 2 ]; then quiet=--progress-bar; fi
  echo "downloading $url"
  for attempt in 1 2 3 4 5; do
    status=0
    answer=$(curl --fail --location $quiet --connect-timeout 30 --speed-limit 1 --speed-time 60 \
      --continue-at - --output "$part" --write-out '%{http_code} %{errormsg}' "$url") || status=$?
    case $status:$answer in
      0:*) return ;;
      22:416*) return ;; # there is no more to send; the caller checks what is there
      22:4*) fail "the server answers ${answer%% *} for $url; check the address" ;;
      33:*) rm -f "$part" ;; # this server cannot continue a file: from the start then
    esac
    if [ "$attempt" -lt 5 ]; then sleep "$attempt"; fi # seconds: a short outage passes by itself
  done
  fail "cannot download $url (${answer#* }); run the same command again to continue"
}

# reject FILE MESSAGE: ends the script over a file that failed its check. A download is deleted,
# or the next run would continue it for ever; a file that the user put there is left alone.
reject() {
  case $1 in
    *.part)
      rm -f "$1"
      fail "$2; that download is deleted, run the same command again to start it anew" ;;
    *) fail "$2; move $1 away and run the same command again" ;;
  esac
}
