"""For all tests: one thread, nothing from the network, and few examples of properties, always the same."""

from __future__ import annotations

import os
import signal

# Before torch or a tokenizer is imported: two threads on a busy machine wait for each other most of the time.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ["HF_HUB_OFFLINE"] = "1"

# A shell starts background jobs with SIGINT ignored, and their children inherit that: the tests send it.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

from hypothesis import settings

settings.register_profile("openzaya", derandomize=True, deadline=None, max_examples=50, database=None)
settings.load_profile("openzaya")
