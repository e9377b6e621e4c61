"""KV on disk: LMDB is the index, a file of pages holds the values."""
