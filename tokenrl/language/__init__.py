"""A causal language model as a token-level policy: load, sample, score, reward, train, evaluate, save."""
