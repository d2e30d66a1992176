"""The protocol explored: every order of moves in small worlds, and random ones in larger worlds."""
