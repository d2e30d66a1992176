"""What the tests stand on: servers, databases, brokers, real processes, and ways to wait for a fact."""

from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
"""The checkout: what worker processes put on their import path."""
