"""The command line: a thin client of the library, one file for each verb."""
