"""What every package may use: C code, compiled once by the machine that runs it."""
