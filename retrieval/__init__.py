"""Which tokens matter: indexes that turn queries into token ids."""
