"""What `headrace-eval` can be asked for, one file each."""
