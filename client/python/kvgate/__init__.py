"""kvgate: KV memory that a daemon owns, scores and evicts.

    with kvgate.Client("/run/kvgate/search.sock") as client:
        client.register(kvgate.Layout("pilot", 256, 6, 4, 2, 32, 32, "bf16", 4, 8192), staging_bytes=4 << 20)
        client.load_gate("gate.safetensors")
        with client.create(kvgate.Policy(ratio=0.3, context_tokens=3000, max_new_tokens=64)) as sequence:
            sequence.reserve(3000)
            ...  # for each layer: sequence.stage_hidden(), and for each head sequence.append(), sequence.attend()
            sequence.commit(3000)
            print(sequence.evict())

The library is found by the environment's KVGATE_LIBRARY, by the loader, or in the build folder of a source checkout.
"""

from kvgate.arrays import Array
from kvgate.client import Client
from kvgate.context import ContextInfo
from kvgate.errors import ConnectionLostError, KvgateError, NotRunningError, RefusedError, StaleError
from kvgate.layout import Layout
from kvgate.policy import Policy
from kvgate.sequence import EvictResult, RecallResult, Residency, Sequence, SequenceInfo, SlotState
from kvgate.view import View

__all__ = [
    "Array",
    "Client",
    "ConnectionLostError",
    "ContextInfo",
    "EvictResult",
    "KvgateError",
    "Layout",
    "NotRunningError",
    "Policy",
    "RecallResult",
    "RefusedError",
    "Residency",
    "Sequence",
    "SequenceInfo",
    "SlotState",
    "StaleError",
    "View",
]
