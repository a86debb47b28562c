"""What happens around training: the run record, progress, sample answers, the adapter, the comparison at the end."""
