"""Run what the command line asks for: a file per group of verbs, with their arguments and the calls that they make."""
