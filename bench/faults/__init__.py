"""What goes wrong on purpose, and what must hold all the same. `make faults`."""
