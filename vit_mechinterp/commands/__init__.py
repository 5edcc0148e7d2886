"""The commands of ``vit-mechinterp``: each prints its answer and returns the exit code."""
