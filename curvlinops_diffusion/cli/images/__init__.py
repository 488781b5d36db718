"""Images, labels and their preprocessing."""
