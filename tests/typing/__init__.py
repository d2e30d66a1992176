"""What the public types promise to a user's type checker."""
