"""The kernels: arrays in, arrays out. `target.prepare` must be called before any other module here is imported."""
