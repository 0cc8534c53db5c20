"""Other people's libraries, one file each; none is imported before its user imports it."""
