#!/usr/bin/env bash
# A real model through every command, with its driver and a worker killed on the way: docs/results.md.
#
#     python benchmarks/smollm2.py --out smollm2
#     bash benchmarks/real_model.sh smollm2 train.txt test.txt DATA WORK
#
# DATA is a directory of local task data (docs/evaluation.md). What every command prints lies in
# WORK/logs afterwards, with its wall and CPU time at the end. Run it again after an interruption:
# what is finished is not repeated. OPTIONS says how to compress, in place of the line below.
set -euo pipefail

model=$(realpath "$1") train=$(realpath "$2") test=$(realpath "$3") data=$(realpath "$4") work=$5
read -ra how <<<"${OPTIONS:---method lestd --metric loss}"
keep=${KEEP:-0.4} keeps=${KEEPS:-0.6,0.4,0.2}
text=(--text "$test" --window 256 --max-windows 16)
mkdir -p "$work/logs"
cd "$work"
calibrated=(--calibrate-on "$train" --samples 32 --calibration calibration)
compress=(lestd compress "$model" "${how[@]}" --keep "$keep" "${calibrated[@]}" --workers 2 --out out)

# Run a command, what it prints into logs/NAME.txt; once it has ended well it is not run again.
step() {
    local name=$1
    shift
    [ -e "logs/$name.done" ] && return
    echo "$(date +%T) $*"
    if (time "$@") >"logs/$name.txt" 2>&1; then touch "logs/$name.done"; else tail -n 3 "logs/$name.txt"; fi
}

# Kill the driver when its log has a line that matches, and a worker of it before that.
# Where the line does not come, the command has ended.
killed_at() {
    local name=$1 pattern=$2
    [ -e "logs/$name.done" ] && return
    echo "$(date +%T) ${compress[*]}, killed at: $pattern"
    "${compress[@]}" >"logs/$name.txt" 2>&1 &
    local driver=$!
    while kill -0 $driver 2>/dev/null && ! grep -qE "$pattern" "logs/$name.txt"; do sleep 1; done
    local raylet worker
    raylet=$(pgrep -P $driver -f raylet/raylet || true)
    worker=$([ -z "$raylet" ] || pgrep -P "$raylet" -f 'Worker' | head -n 1 || true)
    if [ -n "$worker" ]; then kill -9 "$worker" && sleep "${REST:-15}"; fi
    kill -9 $driver 2>/dev/null || true
    wait $driver 2>/dev/null || true
    touch "logs/$name.done"
}

step plan lestd plan "$model" "${how[@]}" --keep "$keep" "${calibrated[@]:0:4}" --time
step audit lestd audit "$model" --keep "$keeps" --html audit.html --run-dir audit
killed_at compress-1 '^calibrate: +[2-9][0-9] %'
killed_at compress-2 '^compress: +[3-9][0-9] %'
step compress-3 "${compress[@]}"
step status lestd status out
step verify lestd verify out
step query-plan lestd query out --name plan-vs-actual
step query-layers lestd query out --name worst-layers
step query-retries lestd query out --name retries
step report lestd report out --out report.html
# Its model of the same keep is the undisturbed one, by another executor.
step sweep lestd sweep "$model" "${how[@]}" --keep "$keeps" "${calibrated[@]}" "${text[@]}" \
    --executor serial --out swept
undisturbed=$(printf 'swept/keep-%.2f' "$keep")
step same bash -c "diff <(cd out && sha256sum *.safetensors *.json | sort) \
    <(cd $undisturbed && sha256sum *.safetensors *.json | sort) && echo the same bytes"
step evaluate lestd evaluate out --against "$model" "${text[@]}" \
    --tasks mathqa,truthfulqa_mc1 --data "$data" --limit 20
step compare lestd compare "$model" --methods "gptq:metric=loss, ${COMPARED:-watersic:metric=loss}" \
    --keep 0.3 "${calibrated[@]}" "${text[@]}" --no-speed --executor serial --out compared
step recover lestd recover out --text "$train" --train factors --steps "${STEPS:-60}" --window 256 \
    --max-windows 16 --out recovered
step export lestd export recovered --dense exported
step bench lestd bench "$model" out --prompt-tokens 64 --new-tokens 33 --repeats 3
lestd serve out --port 0 >logs/serve.txt 2>&1 &
server=$!
while kill -0 $server && ! grep -q 'curl' logs/serve.txt; do sleep 1; done
grep -m 1 -E '^ *curl' logs/serve.txt | bash >logs/answer.txt 2>&1 || true
kill $server
