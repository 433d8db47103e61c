"""Makes the runs of a comparison: in processes of this machine, on a Ray cluster, or as command lines."""
