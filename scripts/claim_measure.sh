#!/usr/bin/env bash
# Measures what scripts/claim.sh trained, on scenes of the training seed's own; then scripts/claim_table.py pools.
#
#   scripts/claim_measure.sh [FOLDER]       SEEDS=1 DOSES=100 ARMS="ours memoryless" does a part; stopped, the same command goes on
#
# DOSES are numbers of updates; 0 is the start, beside the teacher. TRIPS are columns; with other TRIPS or POLICIES the results
# need a folder of their own, MEASURED. All arms of a seed get the same scenes, scripts and noise.
set -euo pipefail
folder=${1:-runs/claim}
measure() { # FILE POLICIES SEED FOLDER
    ${CONTEXT_FORCING:-context-forcing} evaluate --student "$1" --policies "$2" --columns "${TRIPS:-9,18}" --gaps 8 \
        --rollouts "${ROLLOUTS:-8}" --seed "$((50 + $3))" --output "$folder/${MEASURED:-measured}/$4"
}
for dose in ${DOSES:-100 0 50}; do
    for seed in ${SEEDS:-0 1 2}; do
        if [ "$dose" = 0 ]; then
            for name in start teacher; do
                measure "$folder/$name.safetensors" novel,oracle,none "$seed" "$name-$seed-0"
            done
            continue
        fi
        for arm in ${ARMS:-ours memoryless longlive infinity-rope}; do
            case $arm in ours | memoryless) policies=${POLICIES:-novel,oracle} ;; *) policies=none ;; esac
            measure "$folder/$arm-$seed/$dose.safetensors" "$policies" "$seed" "$arm-$seed-$dose"
        done
    done
done
