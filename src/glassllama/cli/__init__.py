"""The command line: one file a verb, and around them options, screen and exit codes."""
