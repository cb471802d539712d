"""The user's config: schema, loader, resources, a user's own code. Imports no torch."""
