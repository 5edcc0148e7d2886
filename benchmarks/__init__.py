"""Benchmarks: each module is a command, ``python -m benchmarks.NAME``; ``python -m benchmarks`` runs all."""
