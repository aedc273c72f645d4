"""What the kernels and decoding cost, measured beside named baselines in the same run. See `make bench`."""
