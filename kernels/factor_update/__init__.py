"""The element-wise steps of an ADMM update of a factor: what lies between its matrix products."""
