"""The fused pass on a CPU, in Numba: a driver and its loops."""
