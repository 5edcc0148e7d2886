"""The differentiable path: clean forwards once, and waves with gradients."""
