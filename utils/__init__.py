"""What several stages share. One subject per file; nothing here knows a particular script."""
