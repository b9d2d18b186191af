"""What lets a run that was stopped go on as if it had not been."""
