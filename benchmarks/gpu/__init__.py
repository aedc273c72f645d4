"""The GPU suite, and what can be said of its kernels without a GPU."""
