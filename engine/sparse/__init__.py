"""What one request attends to when it chooses: caches, indexes, rows."""
