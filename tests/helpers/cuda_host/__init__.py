"""The CUDA kernels, compiled by the host's C++ compiler and run on the CPU."""
