"""Compression: dense weights to DoubleBinaryFactors; knows no graph and no Inductor."""
