"""From a weight to its double binary factors."""
