"""Loads a causal language model as a policy, adapts it with LoRA, and saves it."""
