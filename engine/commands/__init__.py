"""The commands of `headrace`, one file each: `run(args)` does it and returns the exit status."""
