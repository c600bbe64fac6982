"""One update of the weights: objective, accumulation, clipping, optimizer, schedule. Knows no files and no clock."""
