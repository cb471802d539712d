"""What a user may write: the schema, the loader, resources, a user's own code. Imports no torch."""
