"""The model as a policy: loading, adapters, saving."""
