"""What can be rented: instance types, where, at what price; and which of it is chosen."""
