"""The command line, one command a file; `main` parses the arguments and calls them.

Commands read options, call the library and print.
They must not hold logic that a caller of the library would need.
"""
