"""Hugging Face transformers on kvgate: generate() of unmodified models with its KV in kvgated.

import kvgate.transformers
with kvgate.transformers.attach(model, "/run/kvgate/chat.sock", gate="gate.safetensors") as kv:
    tokens = kv.generate(**tokenizer(text, return_tensors="pt"), ratio=0.3, max_new_tokens=100)
"""

from .attachment import Attachment, attach
from .cache import KvgateCache

__all__ = ["Attachment", "KvgateCache", "attach"]
