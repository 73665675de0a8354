#!/bin/bash
# The training measurements, ours and the peers', one after another on one GPU (sft_full_2gpu: two): bash bench/training.sh SECONDS NAME..
# Before: python bench/world.py runs/bench --tokenizer FOLDER. Afterwards: python bench/record.py runs/bench/NAME --metric NAME
# --peer PEER --peer-file runs/bench/peers.jsonl. A run of ours is killed after SECONDS (most of which are steps); a peer measures as long.
cd "$(dirname "$0")/.." || exit 1
seconds=$1
shift
lora=(--lora_rank=64 --lora_alpha=128 --moments=fp32)
peers=(--world runs/bench --out runs/bench/peers.jsonl)

. bench/shell.sh

ours() { # NAME SCRIPT [KEY..]: killed, because a run that ends would write 16 GB that nobody needs
  name=$1 script=$2 config=${config:-bench/llama8b.py}
  shift 2
  echo "== $name: $script $config $*"
  rm -rf "runs/bench/$name"
  nvidia-smi -i 0 --query-gpu=clocks.sm,power.draw --format=csv,noheader,nounits -lms 1000 > "runs/bench/$name.clocks.csv" &
  sampler=$!
  run=(python3)
  [ "${gpus:-1}" = 1 ] || run+=(-m torch.distributed.run --nproc-per-node "$gpus")
  "${run[@]}" "$script" "$config" --out_dir="runs/bench/$name" "$@" > "runs/bench/$name.log" 2>&1 &
  leader=$!
  (sleep "$seconds"; kill -KILL $(tree "$leader")) > /dev/null 2>&1 &
  killer=$!
  wait "$leader" 2> /dev/null
  kill "$killer" "$sampler" 2> /dev/null
  grep "^step \|rror:" "runs/bench/$name.log" | tail -n 4
}

peer() { # NAME [OPTION..]
  echo "== peer $*"
  python3 bench/peers.py "$@" "${peers[@]}" --seconds $((seconds * 6 / 10)) 2>&1 | grep "per_s\|peak_mem\|clocks\|recompute\|Error" | grep -v "^mean"
}

for name in "$@"; do
  case $name in
    sft_full) ours sft_full train_sft.py ;;
    sft_full_flash4) ours sft_full_flash4 train_sft.py --attention=flash4 ;;
    sft_full_fp8) ours sft_full_fp8 train_sft.py --precision=fp8 ;;
    sft_full_plain) ours sft_full_plain train_sft.py --kernels=plain --recompute=full ;;
    sft_full_recompute) ours sft_full_recompute train_sft.py --recompute=full ;;
    sft_full_80gb) ours sft_full_80gb train_sft.py --gradients=bf16 --recompute=full --tokens_per_microbatch=4096 ;;
    sft_full_2gpu) gpus=2 ours sft_full_2gpu train_sft.py --moments=fp32 --global_batch_size=24 ;;
    sft_lora) ours sft_lora train_sft.py "${lora[@]}" --lr=1e-4 ;;
    sft_lora_flash4) ours sft_lora_flash4 train_sft.py "${lora[@]}" --lr=1e-4 --attention=flash4 ;;
    dpo_full) ours dpo_full train_dpo.py --share_prefix=false --tokens_per_microbatch=8000 ;;
    dpo_full_shared) ours dpo_full_shared train_dpo.py ;;
    dpo_full_mix) config=bench/llama8b_mix.py ours dpo_full_mix train_dpo.py ;;
    dpo_lora) ours dpo_lora train_dpo.py "${lora[@]}" --lr=5e-6 ;;
    mem_dpo_lora_2048) ours mem_dpo_lora_2048 train_dpo.py "${lora[@]}" --lr=5e-6 --tokens_per_microbatch=4096 --recompute=full ;;
    dpo_lora_4096) ours dpo_lora_4096 train_dpo.py "${lora[@]}" --lr=5e-6 --tokens_per_microbatch=4096 ;;
    hf_sft) peer hf_sft ;;
    hf_sft_compile) peer hf_sft --compile ;;
    hf_sft_liger) peer hf_sft --liger ;;
    hf_lora) peer hf_lora ;;
    trl_dpo) peer trl_dpo ;;
    trl_dpo_mix) peer trl_dpo --data dpo_mix.jsonl ;;
    trl_dpo_lora) peer trl_dpo_lora ;;
    *) echo "unknown measurement '$name'; expected one of this file's cases" >&2; exit 1 ;;
  esac
done
