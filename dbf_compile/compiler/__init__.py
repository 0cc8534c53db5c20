"""From a graph of torch to compiled code: the backend, lowerings, and what is private to torch."""
