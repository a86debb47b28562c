#!/usr/bin/env bash
# One GPU under SLURM. Five minutes before the time limit the job is told with USR1: it finishes its step, saves, puts
# itself back into the queue, and goes on there, since the run's name follows from the job's id.
#SBATCH --job-name=glmft
#SBATCH --gres=gpu:1
#SBATCH --cpus-per-task=8
#SBATCH --mem=64G
#SBATCH --time=04:00:00
#SBATCH --signal=B:USR1@300
#SBATCH --requeue
#SBATCH --open-mode=append

python -m glmft.train "$@" &
child=$!
trap 'kill -USR1 "$child"; wait "$child"' USR1 # the shell gets the signal and hands it on
trap 'kill -TERM "$child"; wait "$child"' TERM
wait "$child"
