"""LoRA through PEFT: which layers get an adapter, injection, saving and loading in PEFT's own format."""
