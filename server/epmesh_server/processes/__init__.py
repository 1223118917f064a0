"""Child processes that are forked from a server with torch and end with their owner."""
