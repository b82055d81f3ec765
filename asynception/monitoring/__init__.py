"""What a run shows of itself while it goes on, to people and to programs."""
