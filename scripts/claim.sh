#!/usr/bin/env bash
# The claim, in miniature: one student distilled four ways, three seeds each, from the same start with the same budget.
#
#   scripts/claim.sh STUDENT TEACHER [FOLDER [key=value ...]]
#   scripts/claim.sh runs/local/student.safetensors runs/teacher/teacher.safetensors runs/claim
#
# ours           Slow-Fast student, context teacher: teacher and critic see what the student remembers
# memoryless     Slow-Fast student, teacher and critic see its latest frames only (short windows, as LongLive trains)
# longlive       sliding window of LongLive (sink 3, window 12), the same teacher
# infinity-rope  sliding window of Infinity-RoPE (sink 1, window 6), the same teacher
#
# Stop it at any time; the same command goes on. SEEDS=1 ARMS=ours does a part. Then measure, with the sliding windows as they are:
#   context-forcing evaluate --student runs/claim/ours-0/student.safetensors --policies clean,novel \
#       --compare runs/claim/memoryless-0/student.safetensors --compare runs/claim/longlive-0/student.safetensors=none ...
# Recall must come from the teacher: true clips and true camera moves would teach it to every student.
set -euo pipefail
student=$1 teacher=$2 folder=${3:-runs/claim}
shift $(($# < 3 ? $# : 3))
for seed in ${SEEDS:-0 1 2}; do
    for arm in ${ARMS:-ours memoryless longlive infinity-rope}; do
        case $arm in
            ours) settings=() ;;
            memoryless) settings=(teacher_sees=recent) ;;
            *) settings=(teacher_sees=recent "memory=$arm") ;;
        esac
        out=$folder/$arm-$seed
        compgen -G "$out/checkpoints/step-????????" >/dev/null && resume=(--resume) || resume=()
        ${CONTEXT_FORCING:-context-forcing} train contextual --config demo student="$student" teacher="$teacher" \
            anchor.weight=0 gate_every=0 recall_weight=1 normaliser=all seed="$seed" data_seed="$((seed + 1))" out="$out" ${settings[@]+"${settings[@]}"} "$@" ${resume[@]+"${resume[@]}"}
    done
done
