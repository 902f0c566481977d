"""Measurements: one command each, which prints a table and writes it as JSON beside device, versions and seed."""
