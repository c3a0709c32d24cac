"""Domains: import, prepare, simulate, read. This package imports nothing by itself."""
