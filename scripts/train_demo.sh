#!/usr/bin/env bash
# The demo codec and student from nothing, stage by stage: codec, pretraining, context teacher, distillation.
# The end is FOLDER/contextual/student.safetensors; stopped at any time, the same command goes on.
#
#   scripts/train_demo.sh [FOLDER]          default: runs
#
# Environment: CONFIG (default demo; smoke only runs through all stages), CONTEXT_FORCING (the command).
set -euo pipefail
folder=${1:-runs}
stage() {
    local name=$1
    shift
    compgen -G "$folder/$name/checkpoints/step-????????" >/dev/null && resume=(--resume) || resume=()
    ${CONTEXT_FORCING:-context-forcing} train "$name" --config "${CONFIG:-demo}" out="$folder/$name" "$@" ${resume[@]+"${resume[@]}"}
}
codec=codec=$folder/vae/demo_codec.safetensors
stage vae
stage pretrain "$codec"
stage teacher "$codec" init="$folder/pretrain/student.safetensors"
stage local "$codec" student="$folder/pretrain/student.safetensors" teacher="$folder/teacher/teacher.safetensors"
stage contextual "$codec" student="$folder/local/student.safetensors" teacher="$folder/teacher/teacher.safetensors"
