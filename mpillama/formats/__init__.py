"""Model files: the native format, and how ranks read their slices of it."""
