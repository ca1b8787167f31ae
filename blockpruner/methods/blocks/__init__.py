"""Methods that remove blocks."""
