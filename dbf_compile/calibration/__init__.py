"""Running models on data: batches, losses, second moments of layers, onload and offload, comparison of two models."""
