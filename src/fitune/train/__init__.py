"""The loop around the step: run folder, checkpoints, log, progress, validation."""
