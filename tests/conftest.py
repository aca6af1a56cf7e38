"""What every test runs under: one thread (files run side by side), and no hub."""

import os

os.environ.update(
    OMP_NUM_THREADS="1",
    HF_HUB_OFFLINE="1",  # nothing waits for a hub
    TOKENIZERS_PARALLELISM="false",
)
