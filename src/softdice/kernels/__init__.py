"""The fused pass: which backend serves a tensor (registry), the torch.library operators (ops), the kernels (cpu)."""
