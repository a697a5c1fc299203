#!/usr/bin/env bash
# What to start once on a machine with GPUs: the tests, the speed of every part, ten minutes of training the 343M model,
# a batch served by vLLM. It ends with a Markdown table to paste. Nothing is downloaded: codes and weights are random.
#
#   tests/gpu.sh           about an hour
#   tests/gpu.sh --small   every stage at a size for a CPU, in minutes: so that this file stays right
#
# $PYTHON is the interpreter (.venv/bin/python), $OUT the folder of logs and results (runs/gpu).
set -euo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-.venv/bin/python}
OUT=${OUT:-runs/gpu}
if [ "${1:-}" = --small ]; then
    tests="tests/test_gpt.py -k cached" bench="load train sample --model demo --batch 4" vq=VQ-demo model=demo image_size=24
    train="--batch-size 8 --lr 3e-6 --max-steps 20 --log-every 10" seconds=600
else
    tests="tests" bench="" vq=VQ-16 model=L image_size=256
    train="--epochs 300 --log-every 20" seconds=600
fi
gpus=$("$PYTHON" -c "import torch; print(torch.cuda.device_count())")
processes=$((gpus > 1 ? gpus : 1))
[ "$model" = demo ] || train="$train --batch-size $((32 * processes))"
rm -rf "$OUT/codes" "$OUT/gpt" "$OUT/exported"   # of an earlier run
mkdir -p "$OUT"
stage() { echo "$(date +%T)  $*"; }

stage "1/5  tests: $OUT/tests.log"
"$PYTHON" -m pytest -v $tests > "$OUT/tests.log" 2>&1 || stage "some tests failed; continuing"

stage "2/5  speed of every part: $OUT/bench.jsonl"
"$PYTHON" tests/bench.py $bench > "$OUT/bench.jsonl" 2> "$OUT/bench.log" || stage "bench.py stopped early; continuing"

stage "3/5  random codes and an untrained tokenizer: $OUT/codes"
"$PYTHON" - "$OUT" "$vq" "$image_size" << 'PYTHON'
import json, sys
from dataclasses import asdict
from pathlib import Path
import numpy as np
sys.path.insert(0, ".")
import vq
from nanollamagen import files
out, name, size = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
model = vq.VQModel(vq.VQ_CONFIGS[name])
files.save_checkpoint({"model": model.state_dict(), "config": asdict(model.config), "image_size": size}, out / "vq.pt")
grid, V = size // model.config.downsample, model.config.codebook_size
(out / "codes").mkdir()
np.save(out / "codes" / "codes.npy", np.random.default_rng(0).integers(0, V, (20_000, 1, grid ** 2), dtype=np.uint16))
np.save(out / "codes" / "labels.npy", np.arange(20_000, dtype=np.int32) % 1000)
meta = {"classes": [str(i) for i in range(1000)], "h": grid, "w": grid, "codes": grid * grid, "codebook_size": V, "image_size": size,
        "tokenizer": vq.weights_hash(model), "skipped": []}
(out / "codes" / "meta.json").write_text(json.dumps(meta))
PYTHON

stage "4/5  training of $model on $processes process(es), $seconds s at most: $OUT/gpt/log.jsonl"
launch="$PYTHON"
[ "$processes" = 1 ] || launch="$PYTHON -m torch.distributed.run --standalone --nproc_per_node=$processes"
# On SIGTERM train_gpt.py finishes its step, saves and ends.
timeout --signal=TERM --kill-after=300 "$seconds" $launch train_gpt.py --codes "$OUT/codes" --model "$model" $train \
    --out "$OUT/gpt" > "$OUT/train.log" 2>&1 || true
[ -f "$OUT/gpt/ckpt.pt" ] || { tail -n 20 "$OUT/train.log"; exit 1; }

stage "5/5  a batch sampled by vLLM: $OUT/served.png"
if "$PYTHON" -c "import vllm" 2> /dev/null; then
    "$PYTHON" serve_vllm.py export --gpt "$OUT/gpt/ckpt.pt" --vq "$OUT/vq.pt" --out "$OUT/exported" > "$OUT/serve.log" 2>&1 &&
    "$PYTHON" serve_vllm.py generate "$OUT/exported" --classes 1,2,3,4 --count 2 --out "$OUT/served.png" \
        >> "$OUT/serve.log" 2>&1 || stage "serving failed; see $OUT/serve.log"
    if [ "$gpus" -gt 1 ]; then   # a copy of the model and an HTTP server on each GPU; then a look at where memory is
        "$PYTHON" serve_vllm.py serve "$OUT/exported" --data-parallel-size "$gpus" --port 8765 > "$OUT/copies.log" 2>&1 &
        curl -sf --retry 90 --retry-delay 2 --retry-all-errors http://127.0.0.1:8765/v1/images/generations --max-time 60 \
            -H 'Content-Type: application/json' -d '{"prompt": "1", "n": 8}' -o "$OUT/copies.json" \
            || stage "copies failed; see $OUT/copies.log"
        nvidia-smi --query-compute-apps=pid,gpu_uuid,used_memory --format=csv > "$OUT/copies.csv"
        kill -TERM $! && wait $! || true
    fi
else
    echo "vLLM is not installed" > "$OUT/serve.log"
fi

stage "done; to paste:"
"$PYTHON" - "$OUT" << 'PYTHON'
import json, sys
from pathlib import Path
out = Path(sys.argv[1])
lines = {name: (out / name).read_text().splitlines() for name in ("tests.log", "bench.jsonl", "gpt/log.jsonl", "serve.log")}
machine, *cases = [json.loads(line) for line in lines["bench.jsonl"] if line.startswith("{")] or [{}]
train = json.loads(lines["gpt/log.jsonl"][-1])
served = next((line for line in reversed(lines["serve.log"]) if "images/s" in line), lines["serve.log"][-1])
print("\n| what | result |\n|---|---|")
print("| machine |", ", ".join(f"{key} {value}" for key, value in machine.items()), "|")
print("| tests |", lines["tests.log"][-1].strip("= "), "|")
for case in cases:
    name = " ".join(str(case[key]) for key in ("case", "model", "batch", "images") if key in case)
    print(f"| {name} |", ", ".join(f"{k} {v}" for k, v in case.items() if k not in ("case", "model", "batch", "images")), "|")
print("| training |", ", ".join(f"{k} {v:.5g}" for k, v in train.items()), "|")
print("| vLLM |", served.strip(), "|")
PYTHON
