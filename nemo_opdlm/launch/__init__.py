"""Runs as jobs: a file of its configuration and a process, or a batch job, each."""
