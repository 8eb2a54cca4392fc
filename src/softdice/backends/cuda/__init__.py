"""The fused pass on a GPU, in Triton: a driver and its kernels."""
