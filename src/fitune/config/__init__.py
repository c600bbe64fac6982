"""What the user wrote: the run file, read strictly."""

from fitune.config.run_file import load
from fitune.config.schema import (
    DataSettings,
    DataSource,
    EvaluateSettings,
    LoraSettings,
    RunConfig,
    TrainSettings,
)
from fitune.config.starter import starter_file
from fitune.config.writing import dump

__all__ = [
    "DataSettings",
    "DataSource",
    "EvaluateSettings",
    "LoraSettings",
    "RunConfig",
    "TrainSettings",
    "dump",
    "load",
    "starter_file",
]
