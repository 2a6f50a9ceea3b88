"""The types that kernels take, one module each, called as the type."""
