"""Looking at a trained policy: interactive completions and best-of-n."""
