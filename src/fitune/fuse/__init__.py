"""Fused parts in place of a model's own: found by structure, proven by behaviour, otherwise left alone."""
