#!/usr/bin/env bash
# What a GPU does with LeSTD, in about 8 minutes on one H100: its tests, the decomposition of a layer,
# decode and prefill against dense, a whole small run; one table at the end, in Markdown.
#
#     benchmarks/gpu.sh [DIR]        logs go to DIR (default: build/gpu); needs `make .venv/installed-dev`
#     DEVICE=cpu WIDTHS=512 benchmarks/gpu.sh     tries the script itself where there is no GPU
#
# Each part has its own limit of time; one that fails or is cut off is said so, the others still run.
set -uo pipefail
cd "$(dirname "$0")/.."
logs=${1:-build/gpu}
device=${DEVICE:-cuda}
widths=${WIDTHS:-1536 4096 7168}
python=.venv/bin/python
mkdir -p "$logs"

part() { # part NAME SECONDS COMMAND...: runs it into NAME.log, takes down how it ended
  local name=$1 limit=$2 code=0
  shift 2
  echo "== $name: $*" >&2
  timeout "$limit" "$@" >"$logs/$name.log" 2>&1 || code=$?
  case $code in
    0) ended[$name]="" ;;
    124) ended[$name]="cut off after $limit s" ;;
    *) ended[$name]="exit $code, see $logs/$name.log" ;;
  esac
}
row() { echo "| $1 | ${2:-not measured} | $3 |"; }
# cell FILE COLUMN PATTERN: a cell of the first line of a Markdown table that matches
cell() { grep -m 1 -E "$3" "$logs/$1.log" | awk -F ' *[|] *' -v column="$2" '{ print $column }'; }

declare -A ended
machine=$($python -c 'import torch; print(torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU")')
part layer 120 $python benchmarks/one_layer.py --device "$device" --widths $widths --repeats 2 --tensorly-width 0
part backends 120 $python benchmarks/backends.py --device "$device" --quick
part run 120 $python benchmarks/run.py --shape llama-1b --layers 8 --workers 1 --device "$device"
part tests 240 $python -m pytest -m gpu -q -n 0

echo
echo "$machine, $(git rev-parse --short HEAD 2>/dev/null), $(date -u +%F)"
echo
echo "| figure | value | part |"
echo "| --- | ---: | --- |"
for width in $widths; do
  seconds=$(cell layer 9 "^\| $width ")
  row "attention layers a minute, d $width" "$(awk -v s="$seconds" 'BEGIN { if (s > 0) printf "%.1f", 60 / s }')" "layer ${ended[layer]}"
  row "its time over the least, d $width" "$(cell layer 11 "^\| $width ")" "layer ${ended[layer]}"
done
for tokens in 1 16 512 4096; do
  for core in bitmask 2:4; do
    row "keep 0.4, $core, $tokens tokens: time over dense" \
      "$(cell backends 9 "^\| 0.4 \| $core \| [^|]* \| [^|]* \| $tokens \| chosen ")" "backends ${ended[backends]}"
  done
done
row "llama-1b, 8 layers: seconds of the tasks" "$(cell run 3 '^\| tasks, s ')" "run ${ended[run]}"
row "tests marked gpu" "$(tail -n 1 "$logs/tests.log" | tr -d =)" "tests ${ended[tests]}"
