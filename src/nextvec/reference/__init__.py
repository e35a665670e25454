"""The authors' published checkpoint format: names and layouts, settings, and conversion in both directions."""
