"""How stored KV is written: exactly, or in fewer bytes with an error that its names tell."""
