"""Pages to look at: HTML files that hold everything they show."""
