"""Random bytes against everything that reads bytes from outside; `make fuzz MINUTES=2` runs it for longer."""
