"""Codecs: how matrices and few-bit values are stored, byte by byte."""
