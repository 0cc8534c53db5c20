"""The product with a packed sign matrix: reference, C++ and Triton, side by side."""
