"""The comparison table: its value (``values``), how it is made (``build``), and one renderer a format. Entry: ``harness.table``."""
