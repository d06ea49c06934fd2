"""The table and the plot of `benchmarks.any_step`."""
