"""What is computed in which order: chunks that fit into memory, clean forwards, and waves of rows."""
