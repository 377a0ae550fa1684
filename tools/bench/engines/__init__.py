"""kvgate-bench engines: Hugging Face transformers on kvgate, beside its own caches, on one machine."""
