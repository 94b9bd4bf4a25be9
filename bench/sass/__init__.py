"""Machine code of NVIDIA GPUs, run on the CPU a block at a time, and counted (machine.py)."""
