"""From specs to bound runs: every selector, tensor and column resolved on one model, and checked."""
