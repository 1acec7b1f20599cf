"""One module per command; each registers itself with the application in ``starkv_cli.main``."""
