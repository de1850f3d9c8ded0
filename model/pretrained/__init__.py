"""Models in Hugging Face's format: the names of their parameters, their config.json and their safetensors files."""
