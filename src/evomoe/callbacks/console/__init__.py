"""What a run says in the terminal: progress, and the tables at its end."""
