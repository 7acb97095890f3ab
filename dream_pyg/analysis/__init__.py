"""Studies over many runs: hyper-parameters and the paper's tables."""
