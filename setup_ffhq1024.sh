#!/usr/bin/env bash
# Usage: setup_ffhq1024.sh FOLDER
#
# Checks that FOLDER holds the 70,000 PNG files of FFHQ's images1024x1024, in the official layout
# (00000/00000.png ... 69000/69999.png) or a flat one (00000.png ... 69999.png), and makes a link
# ./ffhq_images1024x1024 to it, where `train.py --hps ffhq1024` looks. Nothing is moved and no
# image is decoded. Download the folder (89.1 GB) from https://github.com/NVlabs/ffhq-dataset
# first; its licence is CC BY-NC-SA 4.0.
#
# Environment: PYTHON  the interpreter (default: .venv of this folder, else python3)

[ -n "${BASH_VERSION:-}" ] ||
  { echo "error: this needs bash: start it as ./setup_ffhq1024.sh or with bash in place of sh" >&2; exit 2; }
source "$(dirname -- "${BASH_SOURCE[0]}")/setup_common.sh"
[ $# -eq 1 ] || fail "one folder is needed, the downloaded images1024x1024; -h shows the usage"
[ -d "$1" ] || fail "no folder $1; name the downloaded images1024x1024"
folder=$(CDPATH='' cd -- "$1" && pwd)
link=ffhq_images1024x1024

# missing_files FOLDER: prints which of the 70,000 files are missing or empty, or nothing.
missing_files() {
  "$PYTHON" - "$here" "$1" <<'END'
import sys

sys.path.insert(0, sys.argv[1])
from data import FfhqFiles

files = FfhqFiles(sys.argv[2])
missing = files.missing()
there = sorted(set(map(files.name, range(len(files)))) - set(missing))
empty = [name for name in there if not (files.root / name).stat().st_size]
problems = []
for what, bad in [("missing", missing), ("empty", empty)]:
    if bad:
        more = ", ..." if len(bad) > 10 else ""
        problems.append(f"{len(bad)} of 70000 files are {what} ({', '.join(bad[:10])}{more})")
print("; ".join(problems))
END
}

problem=$(missing_files "$folder")
[ -z "$problem" ] || fail "in $folder $problem; download them again"

if [ "$link" -ef "$folder" ]; then
  echo "./$link is that folder already, nothing to do"
elif [ -e "$link" ] || [ -L "$link" ]; then
  fail "./$link exists and is not $folder; move it away and run the same command again"
else
  ln -s "$folder" "$link"
  echo "./$link is now a link to $folder"
fi
