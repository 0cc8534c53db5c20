"""The product with a table of quantized rows."""
