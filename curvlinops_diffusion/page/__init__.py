"""The page of scores: what it shows, and how."""
