#!/usr/bin/env bash
# Ten minutes of a GPU, used well: what only a card can show, the most important first, within eight minutes. The last
# parts may be left out; each also runs by its name, see gpu_probes.py.
#
#     bash benchmarks/on_gpu.sh --out DIR            each part's lines in DIR/PART.txt, all of them in DIR/all.txt
#     bash benchmarks/on_gpu.sh --out DIR --seconds 300    stops earlier
#     bash benchmarks/on_gpu.sh --out DIR --smoke    a minute on a CPU: tiny sizes, the same programs
#
# Results are written at once: a run that is cut off keeps what it has. PYTHON=... names another Python.
set -uo pipefail

python=${PYTHON:-python3} out='' smoke=() whole=480
while (($#)); do
    case $1 in
        --out) out=${2:-}; shift $(($# > 1 ? 2 : 1)) ;;
        --seconds) whole=${2:-}; shift $(($# > 1 ? 2 : 1)) ;;
        --smoke) smoke=(--smoke); shift ;;
        *) out=''; break ;;
    esac
done
if [[ -z $out || ! $whole =~ ^[0-9]+$ ]]; then
    echo 'usage: bash benchmarks/on_gpu.sh --out DIR [--seconds N] [--smoke]' >&2
    exit 2
fi
mkdir -p "$out" && out=$(cd "$out" && pwd) && : >"$out/all.txt" || exit 2
cd "$(dirname "$0")/.." || exit 2
export PYTHONUNBUFFERED=1
begin=$SECONDS failed=0

part() { # name, most seconds, command: run it within its time and what is left of the whole
    local name=$1 limit=$2 left=$((whole - (SECONDS - begin))) code
    shift 2
    ((limit < left)) || limit=$left
    if ((limit < 3)); then
        echo "== $name: left out, the $whole s are over" | tee -a "$out/all.txt"
        return 1
    fi
    echo "== $name, at most $limit s" | tee -a "$out/all.txt"
    timeout -k 5 "$limit" "$@" 2>&1 | tee "$out/$name.txt" | tee -a "$out/all.txt"
    code=${PIPESTATUS[0]}
    ((code == 0)) && return
    failed=$((failed + 1))
    echo "== $name: $( ((code == 124 || code == 137)) && echo 'ran out of time' || echo "failed, exit code $code")" |
        tee -a "$out/all.txt"
    return 1
}

probe() { # name, most seconds
    part "$1" "$2" "$python" benchmarks/gpu_probes.py "$1" "${smoke[@]}"
}

probe environment 30
probe ceilings 30
probe checks 175
probe search_steps 120
probe operator_graphs 60
if ((${#smoke[@]})) || ! "$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
    echo 'table: skipped: no GPU, or --smoke' | tee "$out/table.txt" | tee -a "$out/all.txt"
else
    lut=(latency_pkl/make_lat_lut.py --device cuda)
    part table 130 "$python" "${lut[@]}" --budget 40 --save_path "$out/table.pkl" &&
        part table_check 60 "$python" "${lut[@]}" --check "$out/table.pkl" --networks 8 --rounds 2
fi
probe training 60
probe networks 30
probe loading 60
probe first_touch 60
probe depthwise 40
probe widths 30
probe norms 30
probe single_operators 30
echo "== $((SECONDS - begin)) s, $failed parts failed; all lines are in $out/all.txt" | tee -a "$out/all.txt"
((failed == 0))
