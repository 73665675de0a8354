#!/bin/bash
# configs/tulu10.py on N GPUs of one machine: the 8B shape, random weights, rows of the Tulu length mix (bench/tulu10.py).
#     bash bench/tulu10.sh OUT_FOLDER N speed     both stages on N GPUs beside one, and the plan's prediction
#     bash bench/tulu10.sh OUT_FOLDER N resume    SFT unbroken, and killed and resumed: bytes compared; seconds of a checkpoint and of a resume
# Each fits into a rented call of ten minutes. Run folders (metrics, clocks, hashes) and logs go to OUT_FOLDER.
# On a CPU, to try it: PRESET=tiny SECONDS_EACH=1 BATCH=8 KEYS="--max_seq_len=256 --tokens_per_microbatch=1024" bash bench/tulu10.sh ..
cd "$(dirname "$0")/.." || exit 1
out=$1 count=$2 part=$3
. bench/shell.sh
mkdir -p "$out"
batch=${BATCH:-128}
gpu=${GPU:-h200}

speed() {
  python3 bench/world.py runs/bench --no-weights --preset "${PRESET:-llama-3.1-8b}"
  for stage in sft dpo; do # rows are exact: the plan tokenises them, and the runs find its cache
    python3 train_$stage.py bench/tulu10.py --plan --gpu "$gpu" --count "$count" $KEYS > "$out/plan_$stage.txt"
    grep "^memory\|of .* GiB\|tokens/s\|^scaling\|^disk" "$out/plan_$stage.txt"
    python3 train_$stage.py configs/tulu10.py --plan --gpu "$gpu" --count "$count" > "$out/plan_seed_$stage.txt"
    grep "^time\|^total" "$out/plan_seed_$stage.txt" | sed "s/^/of the seed's rows: /"
  done
  say "plans"
  # one GPU has no room for fp32 moments: 16 bytes a parameter, and activations
  alone="--seconds ${SECONDS_EACH:-60} --tag _gpu0 tulu10_sft tulu10_dpo $KEYS --moments=bf16"
  CUDA_VISIBLE_DEVICES=0 timeout 280 python3 bench/session.py $alone --global_batch_size=$((batch / count)) > "$out/gpu0.log" 2>&1
  grep "^RATE\|Error" "$out/gpu0.log" | cut -c1-300
  say "one GPU"
  ranks "$count" bench/session.py --seconds "${SECONDS_EACH:-60}" --tag "_${count}gpu" tulu10_sft tulu10_dpo \
    --global_batch_size=$batch $KEYS > "$out/${count}gpu.log" 2>&1
  grep "^RATE\|^sharding\|Error" "$out/${count}gpu.log" | cut -c1-300
  say "$count GPUs"
  for stage in sft dpo; do
    echo "python bench/record.py runs/bench/tulu10_${stage}_${count}gpu --metric tulu10_${stage}_${count}gpu --peer 'one GPU of the machine (card 0), bf16 moments'"
  done
  tar czf "$out/runs.tgz" runs/bench/*.clocks.csv runs/bench/tulu10_*/{config.json,manifest.json,metrics.jsonl} 2> /dev/null
}

train() { # NAME [KEY..]: four steps with a checkpoint after the second and the last
  local name=$1
  shift
  ranks "$count" train_sft.py bench/tulu10.py --out_dir="runs/bench/tulu10_$name" --max_steps=4 --save_every=2 --global_batch_size=$batch \
    --deterministic $KEYS "$@" 2>&1 \
    | stamped >> "$out/$name.log"
}

kept() { # NAME: hashes of the last checkpoint's files and of the exported model; the files go, for the disk's sake
  local folder=runs/bench/tulu10_$1
  cp "$folder/checkpoints/step_000004/checkpoint.json" "$out/$1.checkpoint.json"
  cp "$folder/final/hashes.json" "$out/$1.final.json"
  du -sh "$folder/checkpoints/step_000004" "$folder/final"
  rm -rf "$folder/checkpoints" "$folder/final"
}

seconds_of() { # PATTERN LOG: on the script's clock, of the last such line
  grep -- "$1" "$2" | tail -n 1 | sed 's/^\[\([0-9]*\) s\].*/\1/'
}

resume() {
  rm -rf runs/bench/tulu10_whole runs/bench/tulu10_killed "$out"/whole.log "$out"/killed.log
  python3 bench/world.py runs/bench --preset "${PRESET:-llama-3.1-8b}"
  say "weights are on the disk"
  train whole
  grep "step 0\|wrote\|waited\|rror" "$out/whole.log" | cut -c1-160
  kept whole
  say "unbroken"
  train killed &
  leader=$!
  wait_for "step 00003/" "$out/killed.log"
  until [ -f runs/bench/tulu10_killed/checkpoints/step_000002/COMPLETED ]; do sleep 0.2; [ -n "$(jobs -rp)" ] || break; done
  saved=$(stat -c %Y runs/bench/tulu10_killed/checkpoints/step_000002/COMPLETED)
  kill -KILL $(tree $leader)
  wait $leader 2> /dev/null
  echo "a checkpoint: $((saved - started - $(seconds_of "step 00002/" "$out/killed.log"))) s after its step"
  say "killed"
  again=$(($(date +%s) - started))
  train killed
  grep "step 0\|wrote\|rror" "$out/killed.log" | tail -n 3 | cut -c1-160
  echo "a resume: $(($(seconds_of "step 00003/" "$out/killed.log") - again)) s from its start to the end of its first step"
  kept killed
  for what in checkpoint final; do
    cmp "$out/whole.$what.json" "$out/killed.$what.json" && echo "$what: equal bytes"
  done
  say "resumed"
}

$part
