"""The ops' benchmarks: rows, peers, targets."""
