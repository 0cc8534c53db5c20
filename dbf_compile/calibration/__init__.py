"""What flows through a model: batches, losses, second moments, and the comparison of two models."""
