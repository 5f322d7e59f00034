"""Other processes: runs that must not write the same files, and work that may not end."""
