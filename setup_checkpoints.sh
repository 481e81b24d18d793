#!/usr/bin/env bash
# Usage: setup_checkpoints.sh NAME [ema|all]
#
# Downloads released weights to the current folder. NAME is imagenet32, imagenet64, ffhq256,
# ffhq1024, cifar10-seed0, cifar10-seed1, cifar10-seed2 or cifar10-seed3. ema, the default, is
# PREFIX-model-ema.th alone, which samples and results are made with; all adds what continues a
# training: PREFIX-model.th, PREFIX-opt.th and PREFIX-log.jsonl (of cifar10, ema is all there is).
# A file gets its name once it opens, with nothing in it that could run code, and fits the preset
# of NAME. Its size and sha256 are then a line of checkpoints.txt, "FILE BYTES SHA256", which a
# file that is in place is held against. Run it again after an interruption: it continues.
#
# Environment: PYTHON           the interpreter (default: .venv of this folder, else python3)
#              CHECKPOINTS_URL  another address of the folders vdvae-assets and vdvae-assets-2

[ -n "${BASH_VERSION:-}" ] ||
  { echo "error: this needs bash: start it as ./setup_checkpoints.sh or with bash in place of sh" >&2; exit 2; }
source "$(dirname -- "${BASH_SOURCE[0]}")/setup_common.sh"
[ $# -le 2 ] || fail "two arguments at most, not $#; -h shows the usage"
"$PYTHON" -c 'import importlib.util, sys; sys.exit(not importlib.util.find_spec("torch"))' ||
  fail "$PYTHON has no torch; install requirements.txt"

base=${CHECKPOINTS_URL:-https://openaipublic.blob.core.windows.net/very-deep-vaes-assets}
record=checkpoints.txt

# NAME, its preset, its folder under the address, the PREFIX of its files
read -r preset place prefix <<<"$(awk -v name="${1:-}" '$1 == name { print $2, $3, $4 }' <<'END'
imagenet32    imagenet32 vdvae-assets   imagenet32-iter-1700000
imagenet64    imagenet64 vdvae-assets-2 imagenet64-iter-1600000
ffhq256       ffhq256    vdvae-assets   ffhq256-iter-1700000
ffhq1024      ffhq1024   vdvae-assets   ffhq1024-iter-1700000
cifar10-seed0 cifar10    vdvae-assets-2 cifar10-seed0-iter-900000
cifar10-seed1 cifar10    vdvae-assets-2 cifar10-seed1-iter-1050000
cifar10-seed2 cifar10    vdvae-assets-2 cifar10-seed2-iter-650000
cifar10-seed3 cifar10    vdvae-assets-2 cifar10-seed3-iter-1050000
END
)"
[ -n "$preset" ] || fail "no released weights are called '${1:-}'; -h shows the names"
case ${2:-ema} in
  ema) files=model-ema.th ;;
  all) files="model-ema.th model.th opt.th log.jsonl" ;;
  *) fail "ema or all is needed second, not '$2'; -h shows the usage" ;;
esac
if [ "$preset" = cifar10 ]; then files=model-ema.th; fi

# file_problem FILE NAME: prints what keeps FILE from being the preset's NAME, or nothing.
file_problem() {
  PYTHONPATH=$here "$PYTHON" - "$1" "$2" "$preset" <<'END'
import sys

import torch

from errors import UserError
from optimizers import convert_optimizer_state
from presets import get_hparams
from resuming import read_log
from vae import VAE
from torch_files import read_torch_file
from weights import check_weights, read_weights

path, name, preset = sys.argv[1:]
with torch.device("meta"):
    model = VAE(get_hparams(preset))
try:
    if name.endswith("log.jsonl"):
        read_log(path)
    elif name.endswith("opt.th"):
        convert_optimizer_state(read_torch_file(path), model.parameters(), True)
    else:
        check_weights(model, read_weights(path), path)
except UserError as error:
    print(str(error))
except Exception as error:  # a damaged file raises nearly anything
    print(f"{path} holds no optimizer state of {preset} ({error})".replace("\n", " "))
END
}

# keep_address FILE URL: so that train.py and sample.py, given URL, take FILE for it.
keep_address() {
  PYTHONPATH=$here "$PYTHON" -c 'import sys; from downloads import keep_address
keep_address(*sys.argv[1:])' "$@"
}

for kind in $files; do
  file=$prefix-$kind
  known=$(awk -v file="$file" '$1 == file { line = $0 } END { print line }' "$record" 2>/dev/null) ||
    known=
  if [ -e "$file" ] && [ -n "$known" ]; then
    found="$file $(bytes_of "$file") $(checksum sha256 "$file")"
    [ "$found" = "$known" ] || reject "$file" "$record has '$known', but this is '$found'"
    echo "$file is in place"
    continue
  fi
  part=$file
  if [ ! -e "$file" ]; then
    make_folder .
    part=$file.part
    fetch "$base/$place/$file" "$part"
  fi
  problem=$(file_problem "$part" "$file")
  [ -z "$problem" ] || reject "$part" "$problem"
  line="$file $(bytes_of "$part") $(checksum sha256 "$part")"
  echo "$line" >>"$record"
  if [ "$part" != "$file" ]; then
    mv "$part" "$file"
    keep_address "$file" "$base/$place/$file"
  fi
  echo "$line: the model of --hps $preset, recorded in $record"
done
