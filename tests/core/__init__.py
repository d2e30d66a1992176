"""The pure core: tables for what people write, properties for what must hold of everything."""
