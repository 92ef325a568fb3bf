"""Chain-dimensional LoRA on HuggingFace encoders."""
