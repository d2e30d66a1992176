"""The chaos run, short, and the tests of its checker: a build that is broken on purpose must be found out."""
