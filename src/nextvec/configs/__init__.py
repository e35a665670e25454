"""Settings files that are shipped, by name, and how any settings file is read."""
