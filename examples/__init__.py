"""Things to try the scripts on."""
