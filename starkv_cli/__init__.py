"""The command line: parses, calls one function of starkv_core, renders."""
