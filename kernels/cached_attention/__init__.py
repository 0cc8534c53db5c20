"""Attention over a cache of keys and values of which only a part is filled."""
