"""Finetuning: signs, scales and norms of a compressed folder learn the dense model's predictions, end to end."""
