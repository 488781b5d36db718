"""What is measured of a query, one kind a file."""
