"""Real expert-parallel runs on a shaped network, and the micro-benchmarks that predictions are made from."""
