#!/usr/bin/env bash
# Measures what scripts/claim.sh trained, seed by seed, on scenes of the seed's own; then scripts/claim_table.py pools.
#
#   scripts/claim_measure.sh PRETRAINED [FOLDER]       SEEDS=1 does a part; stopped, the same command goes on
set -euo pipefail
pretrained=$1 folder=${2:-runs/claim}
for seed in ${SEEDS:-0 1 2}; do
    arm() { echo "$folder/$1-$seed/student.safetensors"; }
    ${CONTEXT_FORCING:-context-forcing} evaluate --student "$(arm ours)" --policies clean,novel,released \
        --compare "$(arm memoryless)=clean,novel" --compare "$(arm longlive)=none" --compare "$(arm infinity-rope)=none" \
        --compare "$pretrained=clean,novel" --columns 9 --gaps 0,8,24 --rollouts 8 --minutes 2 --long-rollouts 2 --seed "$seed" \
        --output "$folder/measured-$seed"
done
