"""The plan that users read: what a schedule amounts to, counted before it runs."""
