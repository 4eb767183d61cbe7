"""The parts of `benchmarks/gpu.py`, a file each; every one is a process of its own and writes rows to a `Sheet`."""
