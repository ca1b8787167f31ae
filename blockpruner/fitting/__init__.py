"""Fitting: the streams and sums from which least squares finds new weights, and the memory that
they take. What is fitted is decided by `methods` and `healing`."""
