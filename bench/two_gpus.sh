#!/bin/bash
# Two GPUs of one machine beside each of them alone, for as many minutes as a rented call has:
#     bash bench/two_gpus.sh OUT_FOLDER "CHECK.." "NAME.." "NAME.." "NAME.." "PEER.."
# names of tests/gpu_checks.py; of bench/session.py for each card alone, both at once, and for the two; of bench/peers.py for the two. Rows of the 8B shape are made first,
# beside the checks, unless they are there. Logs and run folders (metrics, clocks) go to OUT_FOLDER. EXACT="NAME..": on the two once more, under
# --deterministic. NAME:trace prints a table of a step's kernels, on one card and on the two.
cd "$(dirname "$0")/.." || exit 1
out=$1 checks=$2 alone=("$3" "$4") together=$5 peers=$6
seconds=${SECONDS_EACH:-25}
. bench/shell.sh

nvidia-smi topo -m 2> /dev/null | head -4
[ -f runs/bench/base/config.json ] || python3 bench/world.py runs/bench --no-weights ${PRESET:+--preset $PRESET} > "$out/world.log" 2>&1 &
world=$!
case "$*$EXACT" in *_1b*) python3 bench/world.py runs/bench/1b --no-weights --preset "${PRESET:-llama-3.2-1b}" > "$out/world_1b.log" 2>&1 ;; esac
if [ -n "$checks" ]; then
  timeout 240 python3 tests/gpu_checks.py $checks > "$out/checks.log" 2>&1
  grep " ok \|FAILED" "$out/checks.log" | cut -c1-1500
  say "checks"
fi
wait $world
tail -n 1 "$out/world.log" 2> /dev/null
say "world"

if [ -n "${alone[0]}" ]; then
  for gpu in 0 1; do
    CUDA_VISIBLE_DEVICES=$gpu timeout "${ALONE_LIMIT:-300}" python3 bench/session.py --seconds "$seconds" --tag _gpu$gpu ${alone[gpu]} $KEYS > "$out/gpu$gpu.log" 2>&1 &
    pids[gpu]=$!
  done
  wait "${pids[0]}" "${pids[1]}"
  for gpu in 0 1; do grep "^RATE\|^a step\|^  [a-zA-Z]\|^comp\|^expo\|^exch\|Error" "$out/gpu$gpu.log" | cut -c1-300; done
  say "one GPU"
fi
if [ -n "$together" ]; then
  timeout "${TOGETHER_LIMIT:-300}" python3 -m torch.distributed.run --standalone --nproc-per-node 2 bench/session.py --seconds "$seconds" \
    --tag _2gpu $together $KEYS > "$out/2gpu.log" 2>&1
  grep "^RATE\|^a step\|^  [a-zA-Z]\|^comp\|^expo\|^exch\|^sharding\|Error" "$out/2gpu.log" | cut -c1-300
  say "two GPUs"
fi
if [ -n "$EXACT" ]; then
  ranks 2 bench/session.py --seconds "$seconds" --tag _2gpu_exact $EXACT $KEYS --deterministic > "$out/exact.log" 2>&1
  grep "^RATE\|Error" "$out/exact.log" | cut -c1-300
  say "two GPUs, deterministic"
fi
for peer in $peers; do
  timeout "${PEER_LIMIT:-120}" python3 -m torch.distributed.run --standalone --nproc-per-node 2 bench/peers.py $peer --world runs/bench \
    --seconds "$seconds" --out runs/bench/peers.jsonl > "$out/$peer.log" 2>&1
  grep "per_s\|peak_mem\|clocks\|recompute\|Error" "$out/$peer.log" | cut -c1-200
  say "$peer"
done
shopt -s nullglob # what a call did not measure is not there
tar czf "$out/runs.tgz" runs/bench/*.clocks.csv runs/bench/*/{config,manifest}.json* runs/bench/*/metrics.jsonl* runs/bench/peers.jsonl*
