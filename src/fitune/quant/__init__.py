"""4-bit NormalFloat weights: the format, the linear layer that holds them, the lease they are reached through."""
