"""What each command is called, and its options, one module for each. What they do is imported when they run."""
