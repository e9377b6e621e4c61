"""A decode step of many sparse requests in static shapes."""
