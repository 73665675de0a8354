"""configs/tulu10.py on the model and the rows of bench/world.py, nothing else changed: a config for timing.

bench/tulu10.sh says what is measured with it. Rows are repeated until enough steps have been measured.
"""

import runpy

_root = "runs/bench"
_full = runpy.run_path("configs/tulu10.py")
_bench = dict(model_path=f"{_root}/base", num_epochs=100)

common = _full["common"]
sft = _full["sft"] | _bench | dict(out_dir=f"{_root}/tulu10_sft", data={f"{_root}/sft_mix.jsonl": 1.0})
dpo = _full["dpo"] | _bench | dict(out_dir=f"{_root}/tulu10_dpo", data={f"{_root}/dpo_mix.jsonl": 1.0})
