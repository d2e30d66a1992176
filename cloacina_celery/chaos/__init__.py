"""The chaos run: thousands of executions under faults drawn by a seed, and a checker that reads the history."""
