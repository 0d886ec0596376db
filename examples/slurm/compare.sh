#!/bin/bash
# A study as a SLURM array job, one run per task. Runs that were stopped go on when the job is submitted again.
#
#   N=$(abste compare study.toml --list | wc -l)
#   sbatch --array=0-$((N - 1)) compare.sh study.toml studies/mine data
#   abste compare study.toml --out studies/mine --report      # at any time, of what is done
#
#SBATCH --job-name=abste-compare
#SBATCH --cpus-per-task=2
#SBATCH --mem=4G
#SBATCH --time=02:00:00
#SBATCH --signal=B:TERM@120
#SBATCH --output=compare-%a.log
set -eu
study=$1 out=$2 data=$3

# The signal goes to the script, which exec turns into abste: it has two minutes for a checkpoint.
exec abste compare "$study" --out "$out" --data "$data" --task "$SLURM_ARRAY_TASK_ID" --jobs 1
