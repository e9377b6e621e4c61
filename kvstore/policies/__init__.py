"""Policies of eviction, one each: what has to go first among blocks on which nothing rests."""
