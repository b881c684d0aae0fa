#!/usr/bin/env bash
# The claim, in miniature: a student that uses its slow memory little is distilled four ways, three seeds each, by one teacher.
#
#   scripts/claim.sh [FOLDER [key=value ...]]          default: runs/claim
#
# ours           Slow-Fast student, context teacher: teacher and critic see what the student remembers
# memoryless     Slow-Fast student, teacher and critic see its latest frames only (short windows, as LongLive trains)
# longlive       sliding window of LongLive (sink 3, window 12), the same teacher
# infinity-rope  sliding window of Infinity-RoPE (sink 1, window 6), the same teacher
#
# Stop it at any time; the same command goes on. SEEDS=1 ARMS=ours DOSES=50 does a part. The students after so many updates are
# FOLDER/ARM-SEED/DOSE.safetensors; scripts/claim_measure.sh measures them. START and TEACHER are other files to begin with.
# Recall must come from the teacher: true clips would teach it to every student, so there is no anchor. The gate only measures.
set -euo pipefail
cd "$(dirname "$0")/.."
folder=${1:-runs/claim}
shift $(($# < 1 ? $# : 1))
mkdir -p "$folder"
student() { # a student of the demo world from the history of this repository
    [ -s "$folder/$1.safetensors" ] || git show "$2:model/assets/demo_student.safetensors" >"$folder/$1.safetensors"
    echo "$folder/$1.safetensors"
}
start=${START:-$(student start a0d1298)} teacher=${TEACHER:-$(student teacher 7aa9a0f)}
for seed in ${SEEDS:-0 1 2}; do
    for arm in ${ARMS:-ours memoryless longlive infinity-rope}; do
        case $arm in
            ours) settings=() ;;
            memoryless) settings=(teacher_sees=recent) ;;
            *) settings=(teacher_sees=recent "memory=$arm") ;;
        esac
        out=$folder/$arm-$seed
        for dose in ${DOSES:-50 100}; do
            [ -s "$out/$dose.safetensors" ] && continue
            compgen -G "$out/checkpoints/step-????????" >/dev/null && resume=(--resume) || resume=()
            ${CONTEXT_FORCING:-context-forcing} train contextual --config demo preset=demo-4-blocks student="$start" teacher="$teacher" \
                anchor.weight=0 gate_every=25 gate_limit=100 recall_weight=8 normaliser=fast pacing=0.75 long_trips=0 \
                critic_per_student=1 local_every=0 context_from=12 context_to=12 target_from=3 target_chunks=3 decay=0 \
                first_exit_share=0.75 student_optim.lr=1e-4 student_optim.betas=[0.9,0.98] \
                checkpoint_every=50 sample_every=50 seed="$seed" data_seed="$((seed + 1))" out="$out" \
                ${settings[@]+"${settings[@]}"} "$@" steps="$dose" ${resume[@]+"${resume[@]}"}
            cp "$out/student.safetensors" "$out/$dose.safetensors"
        done
    done
done
