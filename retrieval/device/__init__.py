"""The indexes of a batch of requests, in static shapes."""
