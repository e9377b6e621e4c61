"""What it costs and what it loses: evaluation of the engine."""
