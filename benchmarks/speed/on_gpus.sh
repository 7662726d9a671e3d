#!/usr/bin/env bash
# The GPU tables of docs/speed.md: bash benchmarks/speed/on_gpus.sh FOLDER [SECONDS]
#
# Each GPU gets CPU cores of its own and takes the next benchmark when it is free. With two GPUs or more, two are also
# timed together. No benchmark is started later than SECONDS (default 560) after the script. Called again with the same
# FOLDER, it goes on with the benchmarks that have not been started.
set -u
folder=${1:?a folder for the results is expected}
limit=${2:-560}
here=$(dirname "$0")
mkdir -p "$folder"
gpus=$(nvidia-smi -L | wc -l)
[ "$gpus" -gt 0 ] || { echo "on_gpus.sh: no GPU is seen by nvidia-smi; run it where there is one" >&2; exit 2; }
cores=$(($(nproc --all) / gpus))
[ "$cores" -gt 0 ] || cores=1
export PYTHONPATH=$here/../..${PYTHONPATH:+:$PYTHONPATH} OMP_NUM_THREADS=$((cores < 8 ? cores : 8))

bench() { # gpu name options...
  local first=$(($1 * cores)) left=$((limit - SECONDS))
  [ "$left" -gt 0 ] || return 0
  CUDA_VISIBLE_DEVICES=$1 taskset -c "$first-$((first + cores - 1))" python3 "$here/speed.py" --device cuda --repeats 1 \
    --auto-only --time-limit "$left" --out "$folder/$2" "${@:3}" >"$folder/$2.log" 2>&1
}

others=spectra,pyhessian,paper,hessian-eigenthings,spectra:precision=tf32,spectra:precision=bfloat16
queue() { # run on GPU $1 every benchmark that no GPU has started, the longest first
  local name options
  while read -r name options; do
    [ "$SECONDS" -lt "$limit" ] && mkdir "$folder/$name" 2>/dev/null || continue
    # shellcheck disable=SC2086  # options are words
    bench "$1" "$name" $options
  done <<EOF
124M --models 124M --bits 16 --products-scale 0.1 --tasks product,density,trace --tools $others
12M --models 12M --bits 16 --products-scale 0.2 --trace-limit 84 --tasks product,density,trace,topk --tools $others,curvlinops
1.2B --models 1.2B --bits 16 --products-scale 0.02 --tasks product,density --tools $others,curvlinops
124M-topk --models 124M --bits 16 --tasks topk --tools spectra,hessian-eigenthings
12M-ours --models 12M --bits 16 --tasks share,slopes,trace --tools spectra
124M-curvlinops --models 124M --bits 16 --products-scale 0.1 --tasks product,density --tools spectra,curvlinops
124M-2bit --models 124M --bits 2 --products-scale 0.03 --tasks product,density --tools $others
12M-2bit --models 12M --bits 2 --products-scale 0.1 --tasks product,density --tools $others
124M-compiled --models 124M --bits 16 --tasks product --tools spectra,spectra:engine=forward
12M-compiled --models 12M --bits 16 --tasks product --tools spectra,spectra:engine=forward
1.2B-2bit --models 1.2B --bits 2 --products-scale 0.02 --tasks product --tools spectra,paper
EOF
}

if [ "$gpus" -gt 1 ] && [ ! -e "$folder/several_devices.log" ]; then
  CUDA_VISIBLE_DEVICES=0,1 torchrun --nproc-per-node 2 "$here/several_devices.py" --batches 4 --probes 4 --steps 10 \
    --out "$folder/several_devices.json" >"$folder/several_devices.log" 2>&1
fi
for ((gpu = 0; gpu < gpus; gpu++)); do queue "$gpu" & done
wait
cat "$folder"/*/speed.md
