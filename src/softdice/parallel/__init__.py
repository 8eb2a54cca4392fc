"""Many devices, many threads: groups of processes, DTensor, and the one thread pool."""
