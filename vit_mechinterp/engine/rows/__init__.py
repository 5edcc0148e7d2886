"""The rows of all runs: which are equal or begin alike, where they start and end, and in which order."""
