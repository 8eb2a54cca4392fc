"""What runs a pass: which implementation (route), the torch.library operators (op), the kernels (cpu, cuda)."""
