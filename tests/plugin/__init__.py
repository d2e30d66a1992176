"""The plugin as its users meet it: names, isolation, settings, submitting and results."""
