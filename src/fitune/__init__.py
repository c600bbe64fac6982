"""Fine-tuning that fits: QLoRA, LoRA and full fine-tuning of open language models on the machine you have."""

__version__ = "0.1.0"
