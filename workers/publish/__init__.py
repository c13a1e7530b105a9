"""The command line for publishers and operators: `python -m workers.publish`."""
