"""Exact full-vocabulary divergences that never hold the vocabulary (see `kernels.api`)."""
