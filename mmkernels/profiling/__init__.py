"""Where a model's time and memory go, by number of visual tokens."""
