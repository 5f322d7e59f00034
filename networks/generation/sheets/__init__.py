"""What shows the results of a batch side by side."""
