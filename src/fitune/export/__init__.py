"""Handing a trained model over in the formats other tools read."""
