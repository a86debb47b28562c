"""python -m glmft.bench: how fast training is on this machine, beside its ceilings and what one would use else."""
