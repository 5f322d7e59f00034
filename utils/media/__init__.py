"""Pictures and videos as files, and their metadata."""
