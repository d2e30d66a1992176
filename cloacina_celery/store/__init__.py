"""The only SQL of the package: one function per verb of the protocol, each one short statement or transaction."""
