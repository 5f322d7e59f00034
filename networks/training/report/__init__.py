"""The report of a training, as a page that is kept up to date."""
