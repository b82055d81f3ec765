#!/usr/bin/env bash
# Trains RECIPE as the run RUNS/NAME, or goes on with that run if it has begun. What restarts jobs
# (Kubernetes, Slurm) can therefore start it again as it is.
# Usage: train_or_resume.sh RECIPE RUNS NAME [--section.key value ...]
set -euo pipefail
recipe=$1 runs=$2 name=$3
shift 3
if [[ -e "$runs/$name/config.toml" ]]; then
    exec asynception train "$runs/$name" --resume "$@"
fi
exec asynception train "$recipe" --run.storage_path "$runs" --run.name "$name" "$@"
