"""What a run will cost, and which run to choose, from configurations alone: no weights, no cache, no GPU."""
