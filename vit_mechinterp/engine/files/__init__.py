"""Tensors and documents in files: written all at once or not at all, mapped, and under checksums."""
