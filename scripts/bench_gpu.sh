#!/usr/bin/env bash
# Everything that is measured on a CUDA device, in one command: `make bench-gpu`. Needs no download; STUDENT=FILE and
# MODELS_DIR=FOLDER (ComfyUI's models, for the text encoder and the VAE) add a Wan student.
set -euo pipefail
cd "$(dirname "$0")/.."
python="${PYTHON:-.venv/bin/python}"
run="${CONTEXT_FORCING:-.venv/bin/context-forcing}"
out="${OUT_BENCH:-out/bench}"
if ! "$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
    echo "bench-gpu: PyTorch finds no CUDA device, so nothing was measured; on the CPU, use context-forcing bench" >&2
    exit 2
fi
mkdir -p "$out"
wan=(bench --size wan2.1-1.3b --device cuda --chunks "${CHUNKS:-20}" --warmup 3)

# Kernels and compilation, the ports beside them; a kernel that is not installed is named and left out.
"$run" "${wan[@]}" --options "attention=sdpa,flash,sage,sage3 dtype=bf16 compile=off,on" --growth --json "$out/speed.json"
# Where keys and values are, and how many.
"$run" "${wan[@]}" --options "kv_placement=at once,by layer,from RAM" --no-ports --no-film --json "$out/layouts.json"
# The least video memory: weights and keys in RAM.
"$run" "${wan[@]}" --options "kv_placement=from RAM offload=off,on" --no-ports --no-film --json "$out/from_ram.json"
"$run" "${wan[@]}" --options "memory=slow-fast,longlive,infinity-rope" --no-ports --no-film --json "$out/windows.json"
# What the options do to a minute of video.
"$run" bench --device cuda --options "dtype=fp32,bf16" --drift --json "$out/drift_demo.json"
if [ -n "${STUDENT:-}" ]; then
    of=(bench --student "$STUDENT" --device cuda --no-ports ${MODELS_DIR:+--models-dir "$MODELS_DIR"})
    "$run" "${of[@]}" --options "attention=sdpa,flash,sage,sage3" --json "$out/student.json"
    "$run" "${of[@]}" --options "attention=sdpa,flash,sage,sage3" --drift --no-film --chunks 2 --json "$out/drift_student.json" ||
        echo "bench-gpu: no second attention kernel is installed, so there is no drift to measure" >&2
fi
"$python" -m pytest -m gpu tests
echo "bench-gpu: done; every figure is in $out"
