"""The compiled engine for CPUs: C++ built on first use (see `kernels.native.build`)."""
