"""Speed, memory and accuracy of every loss beside its peers: ``python -m benchmarks``."""
