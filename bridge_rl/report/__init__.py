"""What a run shows: metric names, tables and plots."""
