"""The command line: one command per file, and `main`, which parses the arguments and calls the command.

A command reads options, calls the library and prints.
It must not hold logic that a caller of the library would need.
"""
