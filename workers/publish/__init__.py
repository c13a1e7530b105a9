"""The command line for those who publish: `python -m workers.publish`."""
