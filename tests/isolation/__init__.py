"""Isolation, attack by attack: what each level claims to stop, and the canary that tries it."""
