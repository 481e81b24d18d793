#!/usr/bin/env bash
# Usage: setup_cifar10.sh [FOLDER]
#
# Downloads CIFAR-10 and unpacks it as FOLDER/cifar-10-batches-py (FOLDER: the current one unless
# given). Run it again after an interruption: it continues. Once all is there it does nothing.
# The archive, 170 MB, stays in FOLDER and may be deleted.
#
# Environment: PYTHON       the interpreter (default: .venv of this folder, else python3)
#              CIFAR10_URL  another address of cifar-10-python.tar.gz
#              CIFAR10_MD5  the md5 of that archive, where it is not the published one; the
#                           published md5s of the single batches are then not checked

[ -n "${BASH_VERSION:-}" ] ||
  { echo "error: this needs bash: start it as ./setup_cifar10.sh or with bash in place of sh" >&2; exit 2; }
source "$(dirname -- "${BASH_SOURCE[0]}")/setup_common.sh"
[ $# -le 1 ] || fail "one folder at most, not $#; -h shows the usage"

published=c58f30108f718f92721af3b95e74349a
url=${CIFAR10_URL:-https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz}
md5=${CIFAR10_MD5:-$published}
folder=${1:-.}
archive=$folder/cifar-10-python.tar.gz
batches=$folder/cifar-10-batches-py

# batches_problem FOLDER: prints what is wrong with the six batches in it, or nothing.
batches_problem() {
  local want name
  while read -r want name; do
    if [ ! -s "$1/$name" ]; then
      echo "$1/$name is missing or empty"
      return
    fi
    if [ "$md5" = "$published" ] && [ "$(checksum md5 "$1/$name")" != "$want" ]; then
      echo "$1/$name does not have the published md5 $want"
      return
    fi
  done <<'END'
c99cafc152244af753f735de768cd75f data_batch_1
d4bba439e000b95fd0a9bffe97cbabec data_batch_2
54ebc095f3ab1f0389bbae665268c751 data_batch_3
634d18415352ddfa80567beed471001a data_batch_4
482c414d41f54cd18b22e5b47cb7c3cb data_batch_5
40351d587109b95175f43aff81a1287e test_batch
END
}

# unpack ARCHIVE FOLDER: prints why the archive is refused, or nothing. Members are written under
# names from a fixed list, never under their own, so none can land outside FOLDER.
unpack() {
  "$PYTHON" - "$@" <<'END'
import os
import shutil
import sys
import tarfile
import zlib

archive, folder = sys.argv[1:]
names = [f"data_batch_{i}" for i in range(1, 6)] + ["test_batch", "batches.meta", "readme.html"]
files = {f"cifar-10-batches-py/{name}": os.path.join(folder, name) for name in names}
try:
    with tarfile.open(archive, "r:gz") as tar:
        for member in tar:
            if member.isdir() and member.name == "cifar-10-batches-py":
                continue
            if not member.isreg() or member.name not in files:
                print(f"{archive} holds {member.name!r}, which is no file of CIFAR-10")
                sys.exit()
            with tar.extractfile(member) as source, open(files[member.name], "wb") as target:
                shutil.copyfileobj(source, target)
except (tarfile.TarError, zlib.error, EOFError, OSError) as error:
    print(f"{archive} cannot be unpacked ({error})")
END
}

if [ "$md5" != "$published" ]; then
  echo "CIFAR10_MD5 is set: the batches are not checked against their published md5s"
fi
if [ -e "$batches" ]; then
  problem=$(batches_problem "$batches")
  [ -z "$problem" ] || reject "$batches" "$problem"
  echo "$batches is in place, nothing to do"
  exit
fi

make_folder "$folder"
if [ ! -e "$archive" ]; then
  fetch "$url" "$archive.part"
  found=$(checksum md5 "$archive.part")
  [ "$found" = "$md5" ] || reject "$archive.part" "what $url sent has md5 $found, not $md5"
  mv "$archive.part" "$archive"
else
  found=$(checksum md5 "$archive")
  [ "$found" = "$md5" ] || reject "$archive" "$archive has md5 $found, not $md5"
fi

trap 'rm -rf "$batches.part"' EXIT
rm -rf "$batches.part" # a killed run could not tidy up
mkdir "$batches.part"
problem=$(unpack "$archive" "$batches.part")
[ -n "$problem" ] || problem=$(batches_problem "$batches.part")
[ -z "$problem" ] || reject "$archive" "$problem"
mv "$batches.part" "$batches"
echo "$batches is ready"
