"""The examples of an experiment: columns, and images as the model takes them."""
