"""The compression of a whole model: durable, resumable, by any number of processes."""
