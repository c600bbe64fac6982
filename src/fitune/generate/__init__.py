"""Generation: many prompts at once (`generate`), or one as it is spoken (`stream`)."""

from fitune.generate.batch_generation import generate, generate_detailed
from fitune.generate.generation import Generation, GenerationStats
from fitune.generate.token_stream import stream

__all__ = ["Generation", "GenerationStats", "generate", "generate_detailed", "stream"]
