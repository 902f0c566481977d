"""Examples that run offline, on data that packages ship."""
