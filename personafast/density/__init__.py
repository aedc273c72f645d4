"""Density ratios (MPG with SCR, arXiv 2511.01891): policies, targets and samplers."""
