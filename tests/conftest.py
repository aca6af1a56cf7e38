"""What every test runs under: one thread (tests run side by side), no hub, and signals that act."""

import os
import signal

os.environ.update(
    OMP_NUM_THREADS="1",
    HF_HUB_OFFLINE="1",  # nothing waits for a hub
    TOKENIZERS_PARALLELISM="false",
)
# A shell starts background jobs with SIGINT ignored, and child processes inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)
