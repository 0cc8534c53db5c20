"""Graph passes: one pass, one file, imported as ``dbf_compile.passes.<name>``."""
