"""Runs without what makes no difference: what is read of each, and whose values it holds."""
