#!/bin/bash
# The whole way on N GPUs, with the seconds of each part: bash bench/journey.sh OUT_FOLDER N
# SFT; DPO, killed after a checkpoint and started again; the vector; the sweep; the report. 1B shape, random weights.
# On a CPU, to try it: PRESET=tiny KEYS="--max_seq_len=128 --tokens_per_microbatch=512 --global_batch_size=8 --max_steps=4 --save_every=2"
# EXTRACT="--count=20" SWEEP="--layers=2" bash bench/journey.sh ..
cd "$(dirname "$0")/.." || exit 1
out=$1 count=$2
. bench/shell.sh
mkdir -p "$out"
set -o pipefail
rm -rf runs/journey "$out"/journey.log

part() { # NAME COMMAND..: its seconds; its last lines where it fails, which ends the script
  local name=$1 begun=$(date +%s)
  shift
  if ! "$@" > "$out/$name.log" 2>&1; then
    echo "$name FAILED"
    tail -n 5 "$out/$name.log"
    exit 1
  fi
  printf '%-28s %5d s\n' "$name" $(($(date +%s) - begun)) | tee -a "$out/journey.log"
}

killed() { # DPO until its first checkpoint is finished, then SIGKILL to all of it
  ranks "$count" train_dpo.py bench/journey.py $KEYS &
  local leader=$!
  until ls runs/journey/dpo/checkpoints/step_*/COMPLETED > /dev/null 2>&1; do
    [ -n "$(jobs -rp)" ] || return 1
    sleep 0.2
  done
  kill -KILL $(tree $leader)
  wait $leader 2> /dev/null
  true
}

part world python3 bench/world.py runs/journey --preset "${PRESET:-llama-3.2-1b}"
part sft ranks "$count" train_sft.py bench/journey.py $KEYS
part dpo_killed killed
part dpo_resumed ranks "$count" train_dpo.py bench/journey.py $KEYS
part extract python3 steer.py extract bench/journey.py $EXTRACT
part sweep python3 steer.py sweep bench/journey.py $SWEEP
part report python3 -m reports.page runs/journey/sft runs/journey/dpo runs/journey/steer --out "$out/report.html"
grep "^sharding\|^step\|stopped\|goes on\|resum" "$out/dpo_resumed.log" | head -n 3
grep -i "verdict\|separation" "$out/sweep.log" | tail -n 3
say "the whole way on $count x ${PRESET:-llama-3.2-1b}"
tar czf "$out/journey.tgz" runs/journey/{sft,dpo}/{config.json,manifest.json,metrics.jsonl} 2> /dev/null
